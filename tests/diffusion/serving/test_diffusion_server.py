"""Pixel diffusion behind the images API: the images of the pipeline alone, and a batch that they share."""

import base64
import io
from dataclasses import replace

import openai
import pytest
import torch
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler
from PIL import Image
from serving_client import running_server
from tiny import generators
from tiny_diffusion import build_diffusion_pipeline, build_if_pipeline
from typer.testing import CliRunner

from llamagen_cli.app import app
from llamagen_cli.serve import load_frontend
from llamagen_hf import CascadePipeline, PixelDiffusionPipeline
from llamagen_hf.diffusion.serving.batch import DiffusionBatch
from llamagen_hf.provenance import read_parameters
from llamagen_hf.serving.frontend import ImageRequest


def file_of(b64_json: str) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(b64_json))


def same(b64_json: str, other: Image.Image) -> bool:
    image = Image.open(file_of(b64_json)).convert("RGB")
    return image.size == other.size and image.tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A cascade of a base whose sampler draws noise on the way, which the upsampler's seed depends on."""
    folder = tmp_path_factory.mktemp("cascade")
    base = build_diffusion_pipeline(image_size=8)
    base.register_modules(scheduler=DDPMScheduler.from_config(base.scheduler.config, variance_type="fixed_small"))
    CascadePipeline(base, build_diffusion_pipeline(text=False, upsamples=True)).save_pretrained(folder)
    with running_server(folder, inline=True) as running:
        yield running


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_are_those_of_the_pipeline(server, guidance_scale):
    client, pipe = server.client(), server.pipe
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": 3, "upsampler_num_inference_steps": 2}
    answer = client.images.generate(prompt="a cat", n=2, extra_body={"seed": 5} | settings)
    assert answer.size == "16x16" and answer.usage.output_tokens == 6
    assert answer.usage.input_tokens_details.text_tokens == 2 * 6  # bytes, and the end
    for data, seed in zip(answer.data, (5, 6), strict=True):
        expected = pipe("a cat", generator=generators(seed), **settings)
        assert data.seed == seed and same(data.b64_json, expected.images[0])
        parameters = read_parameters(file_of(data.b64_json))
        assert parameters | {"checkpoint": None} == expected.parameters[0] | {"checkpoint": None}
        assert same(data.b64_json, pipe.redraw(parameters).images[0])
    del settings["upsampler_num_inference_steps"]
    small = client.images.generate(prompt="a cat", size="8x8", extra_body={"seed": 5} | settings).data[0]
    assert same(small.b64_json, pipe.base("a cat", generator=generators(5), **settings).images[0])


def test_previews_are_the_images_as_they_are_predicted(server):
    fields = {"seed": 4, "num_inference_steps": 4}
    stream = server.client().images.generate(
        prompt="a cat", size="8x8", stream=True, partial_images=3, extra_body=fields
    )
    *previews, last = stream
    steps = list(server.pipe.base.stream("a cat", generator=generators(4), num_inference_steps=4))
    assert same(last.b64_json, steps[-1].images[0])
    assert same(previews[0].b64_json, steps[0].images[0])  # further ones are left out when the decoder is busy
    assert all(any(same(each.b64_json, step.images[0]) for step in steps[:-1]) for each in previews)


def test_what_does_not_fit_is_one_sentence(server):
    client = server.client()
    for fields, param in (({"num_inference_steps": 0}, "num_inference_steps"), ({"top_k": 3}, "top_k")):
        with pytest.raises(openai.BadRequestError, match=param) as caught:
            client.images.generate(prompt="a cat", extra_body=fields)
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError, match="edits no images"):
        client.images.edit(image=b"a", prompt="a cat")


def requests(tmp_path, pipe, *settings: dict):
    """A frontend, and requests that differ in their settings and in their seeds."""
    pipe.save_pretrained(tmp_path)
    frontend, generator, _ = load_frontend(str(tmp_path), None, "cpu", torch.float32)
    assert frontend is generator
    (states,) = frontend.encode_prompts(["a cat"])
    asked = [ImageRequest(prompt="a cat", settings=each, partial_images=1) for each in settings]
    prepared = [frontend.prepare(each, states)[0] for each in asked]
    return frontend, [replace(each, seed=seed) for seed, each in enumerate(prepared)]


def drain(batch: DiffusionBatch) -> list[list[str]]:
    """The names that are drawn together in each step."""
    together = []
    while not batch.is_idle:
        together.append(sorted(batch.step().latents))
    return together


def test_images_that_are_drawn_alike_share_steps_on_an_accelerator(tmp_path, monkeypatch):
    pipe = build_diffusion_pipeline()
    settings = [{"num_inference_steps": 2}] * 3 + [{"num_inference_steps": 1}, {"num_inference_steps": 2}]
    frontend, prepared = requests(tmp_path, pipe, *settings)
    batch = frontend.batch_loader(4, threads=1)()
    assert batch.is_idle and frontend.capacity(4) == 1

    def add():
        for name, request in zip("abcde", prepared, strict=True):
            batch.add(name, request)

    add()
    assert drain(batch) == [["a"], ["a"], ["b"], ["b"], ["c"], ["c"], ["d"], ["e"], ["e"]]
    alone = [pipe("a cat", generator=generators(seed), num_inference_steps=2).images[0] for seed in range(3)]
    # The device of a real accelerator is nowhere but in this property.
    monkeypatch.setattr(type(batch.pipe), "device", property(lambda self: torch.device("meta")))
    monkeypatch.setattr(type(batch.pipe), "_execution_device", property(lambda self: torch.device("cpu")))
    add()
    assert batch.statistics == {"drawing": 0, "waiting": 5}
    first = batch.step()
    assert sorted(first.latents) == ["a", "b"] and not first.finished  # guided: two rows each
    assert batch.statistics == {"drawing": 2, "waiting": 3}
    batch.cancel("a")
    batch.cancel("c")
    second = batch.step()
    assert second.finished == {"b"} and sorted(second.latents) == ["b"]
    difference = torch.tensor(bytearray(second.latents["b"][0].tobytes())).int()
    difference -= torch.tensor(bytearray(alone[1].tobytes())).int()
    assert difference.abs().max() <= 1
    assert drain(batch) == [["d"], ["e"], ["e"]]
    add()
    batch.step()
    batch.cancel("a")
    batch.cancel("b")  # the group has no image left, and the next one begins
    assert drain(batch)[0] == ["c"]


@pytest.mark.parametrize("kind", ["dpm", "ddpm", "euler", "deepfloyd"])
def test_the_generator_is_left_as_the_pipeline_leaves_it(tmp_path, kind):
    pipe = build_if_pipeline() if kind == "deepfloyd" else build_diffusion_pipeline()
    if kind == "deepfloyd":
        pipe.save_pretrained(tmp_path / "if")
        pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / "if")
    elif kind != "dpm":
        config, more = pipe.scheduler.config, {"variance_type": "fixed_small"} if kind == "ddpm" else {}
        scheduler = {"ddpm": DDPMScheduler, "euler": EulerAncestralDiscreteScheduler}[kind]
        pipe.register_modules(scheduler=scheduler.from_config(config, **more))
    frontend, (request,) = requests(tmp_path / "own", pipe, {"num_inference_steps": 3})
    generator = generators(0)[0]
    pipe("a cat", num_inference_steps=3, generator=generator)
    assert torch.equal(frontend.generator_after(request).get_state(), generator.get_state())


def test_what_can_not_be_served_is_refused(tmp_path):
    for name, pipe, message in (
        ("upsampler", build_diffusion_pipeline(upsamples=True), "enlarges images"),
        ("noise", build_diffusion_pipeline(text=False), "draws from noise alone"),
    ):
        pipe.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"This checkpoint {message}, so it can't be served"):
            load_frontend(str(tmp_path / name), None, "cpu", torch.float32)
    build_diffusion_pipeline().save_pretrained(tmp_path / "base")
    for option, message in ((["--engine", "vllm"], "vLLM draws codes of LlamaGen"), (["--compile"], "compiles gener")):
        result = CliRunner().invoke(app, ["serve", str(tmp_path / "base"), *option])
        assert result.exit_code == 1 and message in result.output
