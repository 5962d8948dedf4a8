"""A cascade behind the images API: the images of the pipeline alone, at the sizes of its parts."""

import base64
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest
import torch
from PIL import Image
from serving_client import running_command, running_server, save_text_checkpoint
from tiny import build_class_pipeline, generators
from tiny_cascade import build_cascade, build_ddpm_pipeline, build_nested_cascade
from tiny_diffusion import build_diffusion_pipeline

from llamagen_cli.serve import load_frontend
from llamagen_hf import AutoregressiveImagePipeline, CascadePipeline
from llamagen_hf.imagen.serving.frontend import CascadeFrontend
from llamagen_hf.provenance import read_parameters
from llamagen_hf.serving import service as service_module
from llamagen_hf.serving.frontend import ImageRequest
from llamagen_hf.serving.local_engine import LocalEngine
from llamagen_hf.serving.service import ImageService
from llamagen_hf.serving.settings import ServingSettings


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    build_cascade().save_pretrained(folder)
    with running_server(folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def read(data) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data.b64_json)))
    image.load()
    return image


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.size == other.size and image.convert("RGB").tobytes() == other.tobytes()


@pytest.mark.slow
def test_images_are_those_of_the_cascade(server, client):
    settings = {"guidance_scale": 3.0, "top_k": 40, "aug_level": 0.3, "upsampler_guidance_scale": 2.0}
    steps = {"upsampler_num_inference_steps": 3}
    answer = client.images.generate(prompt="a Red apple", n=3, extra_body={"seed": 5} | settings | steps)
    expected = [server.pipe("a Red apple", generator=g, **settings, **steps).images[0] for g in generators(5, 6, 7)]
    assert answer.size == "16x16" and [data.seed for data in answer.data] == [5, 6, 7]
    for data, image in zip(answer.data, expected, strict=True):
        assert same(read(data), image)
    for name, value in (("aug_level", 0.9), ("upsampler_num_inference_steps", 2), ("upsampler_guidance_scale", 1)):
        other = client.images.generate(prompt="a Red apple", extra_body={"seed": 5} | settings | steps | {name: value})
        assert not same(read(other.data[0]), expected[0])


@pytest.mark.slow
def test_the_small_size_is_the_base_alone(server, client, tmp_path):
    answer = client.images.generate(prompt="a fish", size="8x8", extra_body={"seed": 3})
    assert answer.size == "8x8"
    assert same(read(answer.data[0]), server.pipe.base("a fish", generator=generators(3)).images[0])
    (tmp_path / "small.png").write_bytes(base64.b64decode(answer.data[0].b64_json))
    assert "upsampler" not in read_parameters(tmp_path / "small.png")
    with pytest.raises(openai.BadRequestError, match="8x8.*16x16"):
        client.images.generate(prompt="a fish", size="32x32")
    with pytest.raises(openai.BadRequestError, match="aug_level"):
        client.images.generate(prompt="a fish", extra_body={"aug_level": 1.5})


@pytest.mark.slow
def test_a_png_holds_the_parameters_that_redraw_it(server, client, tmp_path):
    data = client.images.generate(prompt="a fish", extra_body={"seed": 3, "aug_level": 0.2}).data[0]
    path = tmp_path / "fish.png"
    path.write_bytes(base64.b64decode(data.b64_json))
    parameters = read_parameters(path)
    alone = server.pipe("a fish", aug_level=0.2, generator=generators(3)).parameters[0]
    assert parameters["upsampler"] == alone["upsampler"] and parameters["checkpoint"] == "tiny"
    assert str(server.folder) not in json.dumps(parameters)
    assert same(Image.open(path), server.pipe.redraw(parameters).images[0])


@pytest.mark.slow
def test_previews_are_enlarged_bicubically(server, client):
    events = list(client.images.generate(prompt="a fish", stream=True, partial_images=2, extra_body={"seed": 4}))
    *previews, last = events
    assert previews and {event.type for event in previews} == {"image_generation.partial_image"}
    assert [read(event).size for event in events] == [(16, 16)] * len(events)
    pipe = server.pipe.base
    codes = pipe("a fish", generator=generators(4), output_type="codes").codes.flatten(1)
    # The first preview is due after a third of the 16 codes, or soon after that.
    possible = [pipe.preview(codes[:, :count])[0].resize((16, 16), Image.Resampling.BICUBIC) for count in range(5, 16)]
    assert any(same(read(previews[0]), image) for image in possible)
    assert same(read(last), server.pipe("a fish", generator=generators(4)).images[0])


@pytest.mark.slow
def test_completions_are_enlarged_too(server, client, tmp_path):
    image = Image.new("RGB", (8, 8), (200, 30, 30))
    image.save(tmp_path / "image.png")
    with open(tmp_path / "image.png", "rb") as file:
        data = client.images.edit(image=file, prompt="a fish", extra_body={"keep_rows": 2, "seed": 6}).data[0]
    assert same(read(data), server.pipe("a fish", image=image, keep_rows=2, generator=generators(6)).images[0])


@pytest.mark.slow
def test_an_upsampler_given_beside_a_plain_checkpoint(tmp_path):
    save_text_checkpoint(tmp_path / "base")
    upsampler = build_diffusion_pipeline(text=False, upsamples=True)
    upsampler.save_pretrained(tmp_path / "upsampler")
    with running_server(tmp_path / "base", upsampler=tmp_path / "upsampler", any_size=True) as running:
        cascade, client = CascadePipeline(running.pipe, upsampler), running.client()
        data = client.images.generate(prompt="a fish", extra_body={"seed": 2}).data[0]
        assert same(read(data), cascade("a fish", generator=generators(2)).images[0])
        (tmp_path / "fish.png").write_bytes(base64.b64decode(data.b64_json))
        assert read_parameters(tmp_path / "fish.png")["upsampler"]["checkpoint"] == "upsampler"
        for size, drawn in (("6x6", cascade.base), ("12x12", cascade)):
            side = int(size.split("x")[0])
            data = client.images.generate(prompt="a fish", size=size, extra_body={"seed": 2}).data[0]
            expected = (
                drawn("a fish", generator=generators(2)).images[0].resize((side, side), Image.Resampling.LANCZOS)
            )
            assert same(read(data), expected)
        with pytest.raises(openai.BadRequestError, match="upsampler_guidance_scale"):
            client.images.generate(prompt="a fish", extra_body={"upsampler_guidance_scale": 2.0})


def test_the_frontend_finishes_codes_as_the_cascade_does(tmp_path):
    cascade = build_cascade()
    cascade.save_pretrained(tmp_path)
    frontend, generator, folder = load_frontend(str(tmp_path), None, "cpu", torch.float32)
    assert frontend.base is generator and folder == str(tmp_path / "base") and frontend.sizes == (8, 16)
    expected = cascade("a fish", aug_level=0.3, generator=generators(5))
    codes = cascade.base("a fish", generator=generators(5), output_type="codes").codes.flatten().tolist()
    (states,) = frontend.encode_prompts(["a fish"])
    for side, image in ((None, expected.images[0]), (16, expected.images[0]), (8, expected.base.images[0])):
        request = ImageRequest(prompt="a fish", settings={"aug_level": 0.3}, side=side)
        prepared, parameters = frontend.prepare(request, states)
        prepared = replace(prepared, seed=5)
        preview, whole = frontend.decode([(prepared, codes[:6]), (prepared, codes)])
        assert same(whole, image) and preview.size == image.size
        found = frontend.complete(prepared, parameters | {"seed": 5})
        assert found.get("upsampler") == (None if side == 8 else expected.parameters[0]["upsampler"])
    given = {"aug_level": 0.5, "top_k": 3}
    assert frontend.resolve_settings(given) == given | {
        name: value for name, value in cascade.sampling_settings().items() if name not in given
    }


def test_requests_of_one_kind_are_enlarged_in_one_batch(monkeypatch, tmp_path):
    build_class_pipeline().save_pretrained(tmp_path)
    generator = load_frontend(str(tmp_path), None, "cpu", torch.float32)[0]
    frontend = CascadeFrontend(generator, build_diffusion_pipeline(text=False, upsamples=True))
    calls = []
    # As on an accelerator, which alone enlarges several at once.
    monkeypatch.setattr(type(frontend.upsampler), "device", torch.device("meta"))
    monkeypatch.setattr(type(frontend.upsampler), "_execution_device", torch.device("cpu"))
    call = type(frontend.upsampler).__call__
    monkeypatch.setattr(
        type(frontend.upsampler), "__call__", lambda self, **given: calls.append(given) or call(self, **given)
    )
    items = []
    for level, seed in ((0.1, 1), (0.2, 2), (0.1, 3)):
        request = ImageRequest(class_label=1, settings={"aug_level": level})
        prepared, _ = frontend.prepare(request, None)
        items.append((replace(prepared, seed=seed), [seed] * 16))
    images = frontend.decode(items)
    assert sorted(len(given["image"]) for given in calls) == [1, 2]
    monkeypatch.undo()
    for index, item in enumerate(items):
        assert same(images[index], frontend.decode([item])[0])


def test_the_queue_is_as_slow_as_the_upsampler(monkeypatch, tmp_path):
    build_class_pipeline().save_pretrained(tmp_path)
    generator = load_frontend(str(tmp_path), None, "cpu", torch.float32)[0]
    frontend = CascadeFrontend(generator, build_diffusion_pipeline(text=False, upsamples=True))
    service = ImageService(frontend, LocalEngine(generator.batch_loader(2), capacity=100), ServingSettings("tiny"))
    clock, call = [0.0], type(frontend.upsampler).__call__

    def takes_a_while(self, **given):
        clock.append(clock[-1] + 0.3)
        return call(self, **given)

    monkeypatch.setattr(type(frontend.upsampler), "__call__", takes_a_while)
    monkeypatch.setattr(service_module, "time", SimpleNamespace(perf_counter=lambda: clock[-1]))
    assert service.seconds_until_free(10) == pytest.approx(0.1)  # of the engine
    request = ImageRequest(class_label=1)
    prepared, parameters = frontend.prepare(request, None)
    service._write_files([([1] * 8, prepared, request, parameters)])  # a preview, which is not enlarged
    assert service.seconds_until_free(10) == pytest.approx(0.1)
    service._write_files([([code] * 16, prepared, request, parameters) for code in (1, 2)])
    assert service.seconds_until_free(10) == pytest.approx(3.0)
    service.seconds_per_image = 100.0
    assert service.seconds_until_free(10) == pytest.approx(10.0)


def test_what_can_not_be_served_is_refused(tmp_path):
    upsampler = build_diffusion_pipeline(upsamples=True)
    for name, pipe in {
        "cascade": build_cascade(),
        "nested": build_nested_cascade(),
        "pixels": build_diffusion_pipeline(),
        "ddpm": CascadePipeline(build_ddpm_pipeline(), upsampler),
        "base": build_class_pipeline(),
        "small": build_diffusion_pipeline(upsamples=True, image_size=8),
    }.items():
        pipe.save_pretrained(tmp_path / name)
    for checkpoint, large, message in (
        ("cascade", "small", "is a cascade and has an upsampler"),
        ("nested", None, "A CascadePipeline can't be served"),
        ("ddpm", None, "A DDPMPipeline can't be served"),
        ("base", "small", "they do not belong together"),
        ("base", "pixels", "draws images from noise alone"),
    ):
        with pytest.raises(ValueError, match=message):
            load_frontend(str(tmp_path / checkpoint), large and str(tmp_path / large), "cpu", torch.float32)


@pytest.mark.slow
def test_the_command_serves_a_cascade(tmp_path):
    build_cascade().save_pretrained(tmp_path / "cascade")
    with running_command(tmp_path / "cascade", tmp_path / "log") as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["cascade"]
        data = client.images.generate(prompt="a fish", extra_body={"seed": 2}).data[0]
    cascade = CascadePipeline.from_pretrained(tmp_path / "cascade")
    assert isinstance(cascade.base, AutoregressiveImagePipeline)
    assert same(read(data), cascade("a fish", generator=generators(2)).images[0])
