"""The app around a prior and its decoder: its tab of variations, alone and before an upsampler."""

import functools
import inspect
import json
import pickle

import pytest
from PIL import Image
from tiny import generators
from tiny_diffusion import build_diffusion_pipeline
from tiny_unclip import build_unclip


pytest.importorskip("gradio")

import gradio as gr  # noqa: E402
from demo_client import running, shown_images  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from llamagen_hf import CascadePipeline  # noqa: E402
from llamagen_hf.demo import studio as studio_module  # noqa: E402
from llamagen_hf.demo.app import lay_out  # noqa: E402
from llamagen_hf.demo.studio import Studio  # noqa: E402
from llamagen_hf.provenance import read_parameters  # noqa: E402


SETTINGS = (2.0, 1.0, 0, 1.0)  # guidance, temperature, top k, top p


@pytest.fixture(scope="module")
def pipe():
    return build_unclip("autoregressive")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "picture.png"
    image = Image.new("RGB", (12, 10), "red")
    image.paste("white", (0, 0, 5, 6))
    image.save(path)
    return str(path)


def varied(pipe, path, *seeds, **settings):
    output = pipe.variation(
        Image.open(path),
        guidance_scale=2.0,
        top_k=0,
        num_images_per_prompt=len(seeds),
        generator=generators(*seeds),
        **settings,
    )
    return output.images


def test_variations_are_those_of_the_pipeline(pipe, path, tmp_path):
    with running(pipe) as url:
        client = Client(url, verbose=False)
        endpoints = client.view_api(return_format="dict")["named_endpoints"]
        assert set(endpoints) == {"/draw", "/vary"}
        required = [
            one["parameter_name"] for one in endpoints["/vary"]["parameters"] if not one["parameter_has_default"]
        ]
        assert required == ["image"]
        settings = {"prior_guidance_scale", "prior_num_candidates"}
        of = {path: {one["parameter_name"] for one in endpoints[path]["parameters"]} for path in endpoints}
        assert settings <= of["/draw"] and not settings & of["/vary"]
        prior = {"prior_guidance_scale": 2.0, "prior_num_candidates": 3}
        drawn, *_ = client.predict("a cat", *SETTINGS, "3", 1, "off", **prior, api_name="/draw")
        expected = pipe("a cat", guidance_scale=2.0, top_k=0, generator=generators(3), **prior).images
        assert [image.tobytes() for image in shown_images(drawn)] == [image.tobytes() for image in expected]
        job = client.submit(handle_file(path), *SETTINGS, "3", 2, "every step", api_name="/vary")
        *frames, (gallery, status, parameters, _) = list(job)
        assert len(frames) == 15 and status.startswith("2 images in")
        images, expected = shown_images(gallery), varied(pipe, path, 3, 4)
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
        entries = gallery["value"] if isinstance(gallery, dict) else gallery
        facts = [read_parameters(entry["image"]) for entry in entries]
        assert facts == json.loads(parameters) and [each["seed"] for each in facts] == [3, 4]
        assert pipe.redraw(facts[1]).images[0].tobytes() == expected[1].tobytes()
        (tmp_path / "text.png").write_bytes(b"no image at all")
        for image, message in ((None, "Choose an image first"), (tmp_path / "text.png", "not in a known format")):
            with pytest.raises(AppError, match=message):
                client.predict(image and handle_file(str(image)), *SETTINGS, "3", 1, "off", api_name="/vary")


def test_an_upsampler_enlarges_variations_on_a_lent_gpu(pipe, path, monkeypatch):
    def GPU(function):  # as on ZeroGPU, where the function runs in a process of its own
        assert inspect.isgeneratorfunction(function)

        @functools.wraps(function)
        def run(*args):
            yield from [pickle.loads(pickle.dumps(value)) for value in function(*pickle.loads(pickle.dumps(args)))]

        return run

    monkeypatch.setattr(studio_module, "GPU", GPU)
    cascade = CascadePipeline(pipe, build_diffusion_pipeline(text=True, upsamples=True))
    cascade.set_progress_bar_config(disable=True)
    last = None
    for *_, parameters, share in Studio(cascade).vary(path, *SETTINGS, "3", 1, "off", 0.2, 3, 1.0, 1):
        if isinstance(parameters, str) and parameters:
            last = json.loads(parameters), read_parameters(share["value"])
    assert last[0] == last[1] and last[0]["upsampler"]["aug_level"] == 0.2
    steps = {"aug_level": 0.2, "upsampler_num_inference_steps": 3, "upsampler_guidance_scale": 1.0}
    (expected,) = varied(cascade, path, 3, **steps)
    assert cascade.redraw(last[0]).images[0].tobytes() == expected.tobytes() and expected.size == (16, 16)


def test_without_an_image_encoder_there_is_no_tab():
    for image_encoder, labels in ((False, ["Text"]), (True, ["Text", "Variations"])):
        demo = lay_out(build_unclip("diffusion", image_encoder=image_encoder), ["a"], "tiny")
        assert [block.label for block in demo.blocks.values() if isinstance(block, gr.Tab)] == labels
    cascade = CascadePipeline(
        build_unclip(image_encoder=False), build_diffusion_pipeline(text=True, upsamples=True, image_size=32)
    )
    with pytest.raises(ValueError, match="The base, a PriorDecoderPipeline, draws no variations of images."):
        cascade.variation(Image.new("RGB", (8, 8)))
