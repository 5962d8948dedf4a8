"""A prior and its decoder behind the images API: prompts and variations, alone and with an upsampler."""

import base64
import io
import json
from dataclasses import replace

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from serving_client import running_server
from tiny import generators
from tiny_diffusion import build_diffusion_pipeline
from tiny_unclip import build_unclip

from llamagen_cli.serve import load_frontend
from llamagen_hf import CascadePipeline
from llamagen_hf.provenance import read_parameters
from llamagen_hf.serving.app import build_app
from llamagen_hf.serving.frontend import ImageRequest
from llamagen_hf.serving.local_engine import LocalEngine
from llamagen_hf.serving.service import ImageService
from llamagen_hf.serving.settings import ServingSettings


# OpenAI calls its route old, but keeps it.
pytestmark = pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")

VARIATIONS = "/v1/images/variations"
LONG = "a very long caption"  # CLIP reads 12 positions


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A cascade, whose small images are those of the prior and its decoder alone."""
    folder = tmp_path_factory.mktemp("cascade")
    base = build_unclip("autoregressive", "diffusion")
    CascadePipeline(base, build_diffusion_pipeline(text=True, upsamples=True)).save_pretrained(folder)
    with running_server(folder, inline=True) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def pipe(server):
    return server.pipe


def picture(color: str = "red") -> Image.Image:
    image = Image.new("RGB", (12, 10), color)
    image.paste("white", (0, 0, 5, 6))
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def file_of(data) -> io.BytesIO:
    return io.BytesIO(base64.b64decode(data.b64_json))


def same(data, other: Image.Image) -> bool:
    image = Image.open(file_of(data)).convert("RGB")
    return image.size == other.size and image.tobytes() == other.tobytes()


def without_checkpoints(parameters: dict) -> dict:
    return {name: value for name, value in parameters.items() if name != "checkpoint"}


def test_images_of_prompts_are_those_of_the_pipeline(client, pipe):
    settings = {"guidance_scale": 3.0, "top_k": 40, "prior_guidance_scale": 2.0, "prior_num_inference_steps": 3}
    answer = client.images.generate(prompt="a cat", n=2, size="8x8", extra_body={"seed": 5} | settings)
    assert answer.usage.input_tokens_details.text_tokens == 2 and answer.usage.output_tokens == 32
    for data, seed in zip(answer.data, (5, 6), strict=True):
        expected = pipe.base("a cat", generator=generators(seed), **settings)
        assert data.seed == seed and same(data, expected.images[0])
        parameters = read_parameters(file_of(data))
        assert parameters["checkpoint"] == "tiny" and parameters["prior"]["seed"] == seed
        assert without_checkpoints(parameters) == without_checkpoints(expected.parameters[0])
    enlarged = client.images.generate(prompt="a cat", extra_body={"seed": 5} | settings).data[0]
    expected = pipe("a cat", generator=generators(5), **settings)
    assert same(enlarged, expected.images[0])
    parameters = read_parameters(file_of(enlarged))
    assert parameters["upsampler"] == expected.parameters[0]["upsampler"]
    assert same(enlarged, pipe.redraw(parameters).images[0])


def test_variations_are_those_of_the_pipeline(server, client, pipe):
    fields = {"seed": 5, "temperature": 0.9}
    answer = client.images.create_variation(image=png(picture()), n=2, size="8x8", user="me", extra_body=fields)
    assert answer.usage.input_tokens_details.image_tokens == 2
    assert answer.usage.input_tokens == 2 and answer.usage.output_tokens == 32
    for data, seed in zip(answer.data, (5, 6), strict=True):
        expected = pipe.base.variation(picture(), temperature=0.9, generator=generators(seed))
        assert data.seed == seed and same(data, expected.images[0])
        parameters = read_parameters(file_of(data))
        assert without_checkpoints(parameters) == without_checkpoints(expected.parameters[0])
        assert same(data, pipe.base.redraw(parameters).images[0])
    enlarged = client.images.create_variation(image=png(picture()), model="tiny", extra_body=fields)
    assert enlarged.size == "16x16"
    assert same(enlarged.data[0], pipe.variation(picture(), temperature=0.9, generator=generators(5)).images[0])
    url = client.images.create_variation(image=png(picture()), size="8x8", response_format="url", extra_body=fields)
    assert httpx.get(url.data[0].url).content == base64.b64decode(answer.data[0].b64_json)
    other = client.images.create_variation(image=png(picture("blue")), size="8x8", extra_body=fields).data[0]
    assert other.b64_json != answer.data[0].b64_json
    assert "ImageVariation" in server.get("/openapi.json").json()["components"]["schemas"]
    form = {"size": "8x8", "stream": "true", "partial_images": "1"} | {name: str(fields[name]) for name in fields}
    stream = httpx.post(server.url + VARIATIONS, files={"image": png(picture())}, data=form, timeout=60).text
    *_, last = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data")]
    assert last["type"] == "image_variation.completed" and last["b64_json"] == answer.data[0].b64_json


def test_an_edit_keeps_the_decoders_codes(client, pipe):
    fields = {"seed": 3, "keep_rows": 2}
    data = client.images.edit(image=png(picture()), prompt="a cat", size="8x8", extra_body=fields).data[0]
    assert same(data, pipe.base("a cat", image=picture(), keep_rows=2, generator=generators(3)).images[0])


def test_what_does_not_fit_is_one_sentence(server, client, pipe):
    def vary(image=None, **fields):
        return client.images.create_variation(image=image or png(picture()), extra_body=fields)

    for call, sentence, param in [
        (lambda: vary(b"no image"), "The image can't be read", "image"),
        (lambda: vary(prior_num_candidates=3), "`prior_num_candidates` is for prompts", "prior_num_candidates"),
        (lambda: vary(prompt="a cat"), "prompt: This server does not know this field", "prompt"),
        (lambda: vary(keep_rows=2), "keep_rows: This server does not know this field", "keep_rows"),
        (lambda: vary(n=11), "n: Input should be less than or equal to 10", "n"),
        (lambda: client.images.generate(prompt=LONG), "longer than the 12 positions that CLIP reads", "prompt"),
    ]:
        with pytest.raises(openai.BadRequestError, match=sentence) as caught:
            call()
        assert caught.value.param == param
    for body in ({"json": {"image": "a"}}, {"files": [("image", b"a"), ("image", b"b")]}, {"files": [("mask", b"")]}):
        answer = httpx.post(server.url + VARIATIONS, timeout=60, **body)
        assert answer.status_code == 400 and set(answer.json()) == {"error"}
    body = {"prompt": LONG, "truncate_prompt": True, "seed": 3, "size": "8x8"}
    answer = httpx.post(server.url + "/v1/images/generations", json=body, timeout=60)
    assert "leaves out its end" in answer.headers["warning"]
    expected = pipe.base(LONG, truncate_prompt=True, generator=generators(3)).images[0]
    assert (
        Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))).tobytes() == expected.tobytes()
    )


def test_a_batch_of_conditions_is_each_by_itself(tmp_path, monkeypatch):
    build_unclip("autoregressive", "autoregressive").save_pretrained(tmp_path)
    frontend, generator, base = load_frontend(str(tmp_path), None, "cpu", torch.float32)
    assert frontend.decoder is generator and base == str(tmp_path / "decoder") and frontend.sizes == (8,)
    settings = {"prior_top_k": 3, "guidance_scale": 2.0}
    assert frontend.resolve_settings(settings) == frontend.pipe.sampling_settings(**settings) | settings
    # Random weights say little beside the noise.
    cold = {"settings": {"prior_temperature": 0.01, "prior_guidance_scale": 9.0}}
    asked = [{"prompt": "a cat"} | cold, {"prompt": "a dog"} | cold, {"prompt": "a cat"}]
    asked += [{"variation_of": png(picture())}, {"variation_of": png(picture("blue"))}]
    prepared = [frontend.prepare(ImageRequest(**each), None)[0] for each in asked]
    prepared = [replace(each, seed=seed) for seed in (1, 2) for each in prepared]
    alone = [frontend.add_conditions([each])[0] for each in prepared]
    encoded, encode = [], type(frontend.pipe).encode_image
    monkeypatch.setattr(type(frontend.pipe), "device", torch.device("meta"))  # as on an accelerator
    monkeypatch.setattr(
        type(frontend.pipe), "encode_image", lambda self, images: encoded.append(len(images)) or encode(self, images)
    )
    for one, other in zip(alone, frontend.add_conditions(prepared), strict=True):
        assert torch.allclose(one.prompt_embeds, other.prompt_embeds, atol=1e-5) and one.seed == other.seed
        after = frontend.generator_after(one), frontend.generator_after(other)
        assert torch.equal(after[0].get_state(), after[1].get_state())
    assert encoded == [2]
    first, second = ([each.prompt_embeds for each in part] for part in (alone[:5], alone[5:]))
    assert [torch.equal(*pair) for pair in zip(first[3:], second[3:], strict=True)] == [True, True]
    assert not torch.equal(*first[3:]) and not torch.equal(*first[:2])
    assert {tuple(each.shape) for each in first} == {(1, 8)}


@pytest.mark.parametrize("has_prior", [True, False])
def test_without_an_image_encoder_there_are_no_variations(tmp_path, has_prior):
    unclip = build_unclip("autoregressive", image_encoder=False)
    (unclip if has_prior else unclip.decoder).save_pretrained(tmp_path)
    frontend, generator, _ = load_frontend(str(tmp_path), None, "cpu", torch.float32)
    service = ImageService(frontend, LocalEngine(generator.batch_loader(2), 1), ServingSettings("tiny", api_key="key"))
    client = TestClient(build_app(service))
    key = {"Authorization": "Bearer key"}
    assert client.post(VARIATIONS, files={"image": png(picture())}).status_code == 401
    answer = client.post(VARIATIONS, files={"image": png(picture())}, headers=key)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_variations"
    assert "they take a prior that has an image encoder" in answer.json()["error"]["message"]
    for method in ("GET", "POST"):
        answer = client.request(method, "/images/variations", headers=key)
        assert answer.status_code == 404 and "ends in /v1, once" in answer.json()["error"]["message"]
    assert VARIATIONS not in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_decoder_of_pixel_diffusion_is_served(tmp_path, guidance_scale):
    build_unclip("diffusion").save_pretrained(tmp_path)
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": 2}
    with running_server(tmp_path, inline=True) as running:
        client, pipe = running.client(), running.pipe
        answer = client.images.generate(prompt="a cat", n=2, extra_body={"seed": 5} | settings)
        assert answer.size == "16x16" and answer.usage.output_tokens == 4
        variations = client.images.create_variation(image=png(picture()), n=2, extra_body={"seed": 5} | settings)
        assert variations.usage.input_tokens_details.image_tokens == 2
        for row, seed in enumerate((5, 6)):
            for data, expected in (
                (answer.data[row], pipe("a cat", generator=generators(seed), **settings)),
                (variations.data[row], pipe.variation(picture(), generator=generators(seed), **settings)),
            ):
                assert data.seed == seed and same(data, expected.images[0])
                parameters = read_parameters(file_of(data))
                assert without_checkpoints(parameters) == without_checkpoints(expected.parameters[0])
                assert same(data, pipe.redraw(parameters).images[0])
        with pytest.raises(openai.BadRequestError, match="pixel diffusion draws all pixels at once") as caught:
            client.images.edit(image=png(picture()), prompt="a cat")
        assert caught.value.code == "no_edits"
