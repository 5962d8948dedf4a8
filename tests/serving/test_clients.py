"""What real clients send to the server: OpenAI's and Hugging Face's own, the bodies of others, browsers, sockets."""

import base64
import io
import json
import socket

import pytest


pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

import httpx  # noqa: E402
import openai  # noqa: E402
from huggingface_hub import AsyncInferenceClient, InferenceClient, constants  # noqa: E402
from huggingface_hub.errors import HfHubHTTPError  # noqa: E402
from PIL import Image  # noqa: E402
from serving_client import RunningServer, running_server, save_text_checkpoint  # noqa: E402
from tiny import build_class_pipeline, generators  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import llamagen_cli  # noqa: E402
from llamagen_hf.llamagen.serving.mask import count_kept_rows  # noqa: E402
from llamagen_hf.provenance import read_parameters  # noqa: E402


GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
ORIGIN = "https://app.example"
FILE = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def server(folder):
    """As it starts without options, but for a limit that is small enough for a test."""
    with running_server(folder, max_body_bytes=2**20) as running:
        yield running


@pytest.fixture(scope="module")
def obliging_server(folder):
    """With the options for clients that want something else."""
    options = {"any_size": True, "response_format": "url", "cors_origins": (ORIGIN,), "url_bytes": 2**19}
    with running_server(folder, **options) as running:
        yield running


@pytest.fixture(scope="module")
def class_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    build_class_pipeline().save_pretrained(folder)
    with running_server(folder, api_key="sesame") as running:
        yield running


@pytest.fixture
def online(monkeypatch):
    """Hugging Face's client does not even call this machine where tests are offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(width: int = 16, height: int = 16) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def band(width: int, height: int, top: int) -> Image.Image:
    """A mask whose rows from `top` on are transparent."""
    mask = Image.new("RGBA", (width, height), (255, 255, 255, 255))
    mask.paste((0, 0, 0, 0), (0, top, width, height))
    return mask


def opened(data: openai.types.Image | dict) -> Image.Image:
    b64_json = data["b64_json"] if isinstance(data, dict) else data.b64_json
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB")


def error_of(answer: httpx.Response, status: int) -> dict:
    """The error of an answer in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def post(server: RunningServer, path: str = GENERATIONS, **kwargs) -> httpx.Response:
    return httpx.post(server.url + path, timeout=60, **kwargs)


# Fields that are missing or repeated


def test_null_means_the_same_as_a_missing_field(server):
    schema = server.get("/openapi.json").json()["components"]["schemas"]["ImageGeneration"]
    nulls = {name: None for name in schema["properties"] if name != "prompt"}
    assert len(nulls) > 15
    fields = {"prompt": "a fish", "seed": 3}
    expected = post(server, json=fields).json()["data"]
    assert post(server, json=nulls | fields).json()["data"] == expected
    # OpenAI's fields that have no effect here, as sent by its client.
    client = server.client()
    data = client.images.generate(
        prompt="a fish", n=None, size=None, quality=None, svg=None, complexity=None, extra_body={"seed": 3}
    ).data
    assert data[0].b64_json == expected[0]["b64_json"]
    assert error_of(post(server, json={"prompt": None}), 400)["param"] == "prompt"


def test_empty_fields_of_a_form_mean_the_same_as_missing_ones(server):
    schema = server.get("/openapi.json").json()["components"]["schemas"]["ImageEdit"]
    empty = {name: "" for name in schema["properties"] if "image" not in name or name == "partial_images"}
    files, fields = {"image": ("a.png", png(noise()))}, {"prompt": "a fish", "seed": "3"}
    expected = post(server, EDITS, data=fields, files=files).json()["data"]
    assert post(server, EDITS, data=empty | fields, files=files).json()["data"] == expected
    # Further fields that clients send in forms, as strings.
    said = {"n": "1", "size": "auto", "model": "tiny", "response_format": "b64_json", "quality": "high", "user": "me"}
    said |= {"background": "auto", "moderation": "low", "style": "vivid", "stream": "false", "partial_images": "0"}
    said |= {"output_format": "png", "output_compression": "100", "input_fidelity": "high"}
    assert post(server, EDITS, data=said | fields, files=files).json()["data"] == expected


def test_one_image_is_edited_whatever_its_field_is_called(server):
    client, first, second = server.client(), png(noise()), png(noise())
    fields = {"prompt": "a fish", "extra_body": {"seed": 3}}
    expected = client.images.edit(image=first, **fields).data
    assert client.images.edit(image=[first], **fields).data == expected  # which is sent as image[]
    assert [event.b64_json for event in client.images.edit(image=[first], stream=True, **fields)] == [
        expected[0].b64_json
    ]
    with pytest.raises(openai.BadRequestError, match="There are 2 files") as caught:
        client.images.edit(image=[first, second], **fields)
    assert caught.value.param == "image"
    for names, status in [(["image"] * 2, 400), (["image", "image[]"], 400), ([], 400), (["image[]"], 200)]:
        files = [(name, ("a.png", first)) for name in names]
        answer = post(server, EDITS, data={"prompt": "a fish", "seed": "3"}, files=files or [("x", ("", b""))])
        assert answer.status_code == status
    for data in ({"image": "text"}, {"image[]": "data:image/png;base64,AAAA"}):
        assert error_of(post(server, EDITS, data=data | {"prompt": "a"}, files=[("mask", first)]), 400)


def test_a_repeated_field_is_refused(server):
    files = [("image", ("a.png", png(noise()))), ("prompt", (None, "a fish")), ("prompt", (None, "a bird"))]
    error = error_of(post(server, EDITS, files=files), 400)
    assert error["param"] == "prompt" and "2 times" in error["message"]


# Masks


@pytest.mark.parametrize("top, kept", [(4, 1), (8, 2), (9, 2), (11, 2), (12, 3), (15, 3), (3, 0), (0, 0)])
def test_a_mask_that_is_a_lower_band_is_generated_anew(server, top, kept):
    """Of 16 rows of pixels 4 are a row of codes; one that is only partly kept is generated."""
    client, image = server.client(), png(noise())
    fields = {"prompt": "a fish", "extra_body": {"seed": 3}}
    drawn = client.images.edit(image=image, mask=png(band(16, 16, top)), **fields)
    expected = client.images.edit(image=image, prompt="a fish", extra_body={"seed": 3, "keep_rows": kept})
    assert drawn.data == expected.data and drawn.usage.input_tokens_details.image_tokens == 4 * kept


def test_masks_are_cropped_as_their_images_are():
    assert count_kept_rows(32, (64, 64), 4) == 2
    assert count_kept_rows(32, (128, 64), 4) == 2
    assert count_kept_rows(64, (64, 128), 4) == 2  # of which rows 32 to 96 are seen
    assert count_kept_rows(20, (64, 128), 4) == 0
    assert count_kept_rows(100, (64, 128), 4) == 4
    assert [count_kept_rows(top, (512, 512), 16) for top in (256, 257, 287, 288, 511)] == [8, 8, 8, 9, 15]
    assert [count_kept_rows(top, (4, 7), 4) for top in (2, 3, 4, 5, 6)] == [0, 1, 2, 3, 4]  # rows 1.5 to 5.5


def test_masks_that_can_not_be_honoured_are_refused(server):
    client, image, tall = server.client(), png(noise()), png(noise(16, 64))
    spot, upper, opaque = band(16, 16, 16), band(16, 16, 0), noise()
    spot.paste((0, 0, 0, 0), (4, 8, 12, 16))
    upper.paste((9, 9, 9, 255), (0, 8, 16, 16))
    middle = band(16, 16, 8)
    middle.paste((9, 9, 9, 255), (0, 12, 16, 16))
    for upload, mask, sentence in [
        (image, png(spot), "over the full width"),
        (image, png(upper), "over the full width"),
        (image, png(middle), "over the full width"),
        (image, png(opaque), "no transparent pixel"),
        (image, png(band(16, 16, 16)), "no transparent pixel"),
        (image, png(noise().convert("L")), "no transparent pixel"),
        (image, png(band(8, 8, 4)), "`mask` is 8x8 and `image` 16x16 pixels"),
        (image, b"no image", "can't be read as an image"),
        (image, png(band(16, 16, 8))[:60], "can't be read as an image"),
        (tall, png(band(16, 64, 60)), "outside of the image's middle square"),
        (tall, png(band(64, 16, 8)), "different sides"),
    ]:
        with pytest.raises(openai.BadRequestError, match=sentence) as caught:
            client.images.edit(image=upload, mask=mask, prompt="a fish")
        assert caught.value.param == "mask", sentence
    with pytest.raises(openai.BadRequestError, match="not both") as caught:
        client.images.edit(image=image, mask=png(band(16, 16, 8)), prompt="a fish", extra_body={"keep_rows": 2})
    assert caught.value.param == "mask"


def test_masks_of_all_modes_and_soft_ones_are_read(server):
    client, image, fields = server.client(), png(noise()), {"prompt": "a fish", "extra_body": {"seed": 3}}
    expected = client.images.edit(image=image, prompt="a fish", extra_body={"seed": 3, "keep_rows": 1}).data
    soft = band(16, 16, 4)
    soft.paste((255, 255, 255, 99), (0, 3, 16, 4))  # only what is fully transparent is generated anew
    for mask in (soft, band(16, 16, 4).convert("LA"), band(16, 16, 4).quantize()):
        assert client.images.edit(image=image, mask=png(mask), **fields).data == expected


def test_an_images_own_transparency_is_its_mask_where_it_can_be(server):
    client, image = server.client(), noise()
    below = image.convert("RGBA")
    below.paste((0, 0, 0, 0), (0, 4, 16, 16))
    round_about = image.convert("RGBA")
    round_about.paste((0, 0, 0, 0), (0, 0, 4, 16))
    for upload, kept in ((below, 1), (round_about, 2), (band(16, 16, 0), 2), (image, 2)):
        answer = client.images.edit(image=png(upload), prompt="a fish", extra_body={"seed": 3})
        assert answer.usage.input_tokens_details.image_tokens == 4 * kept
    answer = client.images.edit(image=png(below), prompt="a fish", extra_body={"keep_rows": 3})
    assert answer.usage.input_tokens_details.image_tokens == 12


# Sizes, addresses, browsers


def test_langchain_gets_addresses_of_images_of_its_size(server, obliging_server):
    """What DallEAPIWrapper passes to OpenAI's client; it reads `url`."""
    asked = {"prompt": "a fish", "n": 1, "size": "1024x1024", "model": "tiny", "quality": "standard"}
    answer = obliging_server.client().images.generate(**asked)
    assert answer.size == "1024x1024" and all(data.b64_json is None for data in answer.data)
    images = [Image.open(io.BytesIO(httpx.get(data.url).content)) for data in answer.data]
    assert [image.size for image in images] == [(1024, 1024)]
    with pytest.raises(openai.BadRequestError, match="'8x8'.*--any-size") as caught:
        server.client().images.generate(**asked)
    assert caught.value.param == "size"


def test_open_webui_gets_images_of_its_size(server, obliging_server):
    asked = {"model": "tiny", "prompt": "a fish", "n": 1, "size": "512x512", "response_format": "b64_json", "seed": 3}
    answer = post(obliging_server, json=asked, headers={"Authorization": "Bearer none"}).json()
    native = opened(post(server, json={"prompt": "a fish", "seed": 3}).json()["data"][0])
    image = opened(answer["data"][0])
    assert image.size == (512, 512) and answer["size"] == "512x512"
    assert image.tobytes() == native.resize((512, 512), Image.Resampling.LANCZOS).tobytes()
    file = {"image": ("image.png", png(noise()), "image/png")}
    fields = {name: str(value) for name, value in asked.items()}
    assert opened(post(obliging_server, EDITS, data=fields, files=file).json()["data"][0]).size == (512, 512)
    events = obliging_server.client().images.generate(
        prompt="a fish", size="512x512", stream=True, partial_images=1, extra_body={"seed": 4}
    )
    assert {(event.size, opened(event).size) for event in events} == {("512x512", (512, 512))}


def test_other_sizes_are_the_largest_square_in_them(obliging_server):
    client = obliging_server.client()
    for size, side in (("1792x256", 256), ("9x12", 9), ("8x8", 8), ("auto", 8), (None, 8)):
        answer = client.images.generate(prompt="a fish", size=size, response_format="b64_json", extra_body={"seed": 3})
        assert opened(answer.data[0]).size == (side, side) and answer.size == f"{side}x{side}"
    for size in (
        "0x8",
        "2049x8",
        "8x",
        "x8",
        "8",
        "8X8",
        "-8x8",
        "8.0x8",
        "٨x٨",
        "8x8x8",
        "8 x 8",
        "9" * 999 + "x8",
        "",
    ):
        error = error_of(post(obliging_server, json={"prompt": "a", "size": size}), 400)
        assert error["param"] == "size" and "WIDTHxHEIGHT, from 1x1 to 2048x2048" in error["message"]
    data = client.images.generate(prompt="a fish", size="32x32", response_format="b64_json").data[0]
    assert read_parameters(io.BytesIO(base64.b64decode(data.b64_json)))["seed"] == data.seed


def test_images_that_do_not_fit_the_url_store_are_refused(obliging_server):
    client = obliging_server.client()
    with pytest.raises(openai.BadRequestError, match="keeps 0.5 MiB for addresses") as caught:
        client.images.generate(prompt="a fish", n=4, size="1024x1024", extra_body={"temperature": 2.0})
    assert caught.value.param == "response_format"


def test_pages_of_allowed_origins_may_call_it(server, obliging_server):
    url, asked = obliging_server.url, {"Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-os"
    preflight = httpx.options(url + GENERATIONS, headers={"Origin": ORIGIN} | asked)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    assert httpx.options(url + GENERATIONS, headers={"Origin": "https://other.example"} | asked).status_code == 400
    fields = {"prompt": "a fish", "seed": 3}
    for answer in (
        post(obliging_server, json=fields, headers={"Origin": ORIGIN}),
        post(obliging_server, json=fields | {"stream": True}, headers={"Origin": ORIGIN}),
        post(obliging_server, json=fields | {"n": 0}, headers={"Origin": ORIGIN}),
        post(obliging_server, "/nothing", headers={"Origin": ORIGIN}),
        post(obliging_server, content=b"a" * (17 * 2**20), headers={"Origin": ORIGIN}),
        httpx.get(url + "/v1/models", headers={"Origin": ORIGIN}),
    ):
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    for answer in (
        post(obliging_server, json=fields, headers={"Origin": "https://other.example"}),
        post(server, json=fields, headers={"Origin": ORIGIN}),
    ):
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_unexpected_errors_have_the_same_shape(obliging_server, monkeypatch):
    def fail(*args):
        raise RuntimeError("/home/someone/secret")

    monkeypatch.setattr(obliging_server.service, "check_prompt", fail)
    answer = post(obliging_server, json={"prompt": "a fish"}, headers={"Origin": ORIGIN})
    assert error_of(answer, 500)["type"] == "server_error" and "secret" not in answer.text
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["x-request-id"].startswith("req_")


def test_errors_mention_a_missing_v1_in_the_base_url(server):
    for base in ("", "/", "/v1/v1", "/api/v1", "//v1", "/V1"):
        client = server.client(base_url=server.url + base)
        for call in (
            lambda client: client.images.generate(prompt="a fish"),
            lambda client: client.images.edit(image=png(noise()), prompt="a fish"),
            lambda client: client.models.list(),
            lambda client: client.models.retrieve("tiny"),
        ):
            with pytest.raises(openai.NotFoundError, match="ends in /v1, once"):
                call(client)
    for path in ("/images/generations", "/images/edits", "/images/variations", "/models", "/v1/v1/models"):
        for method in ("GET", "POST"):
            for end in ("", "/", "//"):
                error = error_of(httpx.request(method, server.url + path + end), 404)
                assert "ends in /v1" in error["message"] and error["code"] == "unknown_url"
    for path in ("/nothing", "/v1/nothing", "/v1/chat/completions", "/images"):
        assert "this server has /v1/images/generations" in error_of(post(server, path), 404)["message"]


def test_addresses_may_end_in_a_slash(server):
    fields = {"prompt": "a fish", "seed": 3}
    assert post(server, GENERATIONS + "/", json=fields).json()["data"] == post(server, json=fields).json()["data"]
    assert server.get("/v1/models/").json() == server.get("/v1/models").json()
    assert server.get("/health/").json() == {"status": "ok"}


# Hugging Face's client


def test_hugging_faces_client_gets_images(server, online):
    expected = server.pipe("a fish", guidance_scale=2.0, top_k=9, generator=generators(5)).images[0]
    for base in ({"model": server.url}, {"base_url": server.url + "/"}, {"base_url": server.url + "/v1"}):
        client = InferenceClient(**base, api_key="hf_any")
        image = client.text_to_image("a fish", guidance_scale=2.0, seed=5, width=8, height=8, extra_body={"top_k": 9})
        assert image.format == "PNG" and image.convert("RGB").tobytes() == expected.tobytes()
    assert client.text_to_image("a fish").size == (8, 8)
    for fields, sentence in [
        ({"height": 512}, "height: Input should be 8; with the option --any-size"),
        ({"negative_prompt": "a bird"}, "negative_prompt: This is a parameter of other models"),
        ({"num_inference_steps": 3}, "num_inference_steps: This is a parameter of other models"),
        ({"scheduler": "ddim"}, "scheduler: This is a parameter of other models"),
        ({"extra_body": {"guidence": 3}}, "guidence: This server does not know this field"),
        ({"guidance_scale": -1.0}, "guidance_scale: Input should be greater"),
        ({"seed": -1}, "seed: Input should be greater"),
    ]:
        with pytest.raises(HfHubHTTPError, match=sentence) as caught:
            client.text_to_image("a fish", **fields)
        assert caught.value.response.status_code == 400
    with pytest.raises(HfHubHTTPError, match="inputs: "):
        client.text_to_image("")
    with pytest.raises(HfHubHTTPError, match="JSON object"):
        client.image_to_image(png(noise()))


def test_hugging_faces_async_client_gets_images(server, online):
    import asyncio

    image = asyncio.run(AsyncInferenceClient(model=server.url).text_to_image("a fish", seed=5))
    assert image.convert("RGB").tobytes() == server.pipe("a fish", generator=generators(5)).images[0].tobytes()


def test_hugging_faces_bodies_are_answered_with_files(server, obliging_server, online):
    body = {"inputs": "a fish", "parameters": {"seed": 5}}
    for accept, media_type in [("image/jpeg", "image/jpeg"), ("image/webp", "image/webp"), ("*/*", "image/png")]:
        answer = post(server, "/", json=body, headers={"Accept": accept})
        assert answer.headers["content-type"] == media_type and answer.headers["x-seed"] == "5"
        assert Image.open(io.BytesIO(answer.content)).get_format_mimetype() == media_type
    for parameters in (None, {}, {"seed": None, "width": None}):
        assert post(server, "/", json={"inputs": "a fish", "parameters": parameters}).status_code == 200
    image = InferenceClient(model=obliging_server.url).text_to_image("a fish", width=768, height=512)
    assert image.size == (512, 512)
    for wrong, param in [
        ({"inputs": None}, "inputs"),
        ({"inputs": ["a", "b"]}, "inputs"),
        ({}, "inputs"),
        ({"inputs": "a", "parameters": []}, "parameters"),
        ({"inputs": "a", "options": {"use_cache": False}}, "options"),
    ]:
        assert error_of(post(server, "/", json=wrong), 400)["param"] == param
    assert error_of(server.get("/"), 405)["message"] == "This address does not take GET, but POST."


def test_classes_are_asked_for_by_name_and_by_number(class_server, online):
    pipe, url = class_server.pipe, class_server.url
    expected = pipe(class_labels=1, generator=generators(5)).images[0].tobytes()
    client = InferenceClient(model=url, api_key="sesame")
    for asked in (
        {"prompt": "goldfish"},
        {"prompt": "1"},
        {"prompt": "", "extra_body": {"class_label": 1}},
        {"prompt": "", "extra_body": {"class_label": "goldfish"}},
    ):
        asked["extra_body"] = asked.get("extra_body", {}) | {"seed": 5}
        if asked["prompt"]:
            assert client.text_to_image(**asked).convert("RGB").tobytes() == expected
        data = class_server.client(api_key="sesame").images.generate(**asked).data[0]
        assert opened(data).tobytes() == expected
    image = client.text_to_image(None, extra_body={"class_label": 1, "seed": 5})
    assert image.convert("RGB").tobytes() == expected
    for body, param in [
        ({"inputs": "unicorn"}, "inputs"),
        ({"inputs": "10"}, "inputs"),
        ({"inputs": "٣٣"}, "inputs"),
        ({"inputs": "9" * 1000}, "inputs"),
        ({"parameters": {"class_label": "unicorn"}}, "class_label"),
        ({"parameters": {"class_label": 10}}, "class_label"),
        ({"inputs": "a", "parameters": {"class_label": 1}}, "inputs"),
        ({}, "inputs"),
    ]:
        answer = post(class_server, "/", json=body, headers={"Authorization": "Bearer sesame"})
        assert error_of(answer, 400)["param"] == param, body
    headers = {"Authorization": "Bearer sesame"}
    for body, param in [({"prompt": "unicorn"}, "prompt"), ({"class_label": "unicorn"}, "class_label")]:
        assert error_of(post(class_server, json=body, headers=headers), 400)["param"] == param
    for path in ("/", "/v1", "/v1/", GENERATIONS):
        error = error_of(post(class_server, path, json={"inputs": "goldfish"}), 401)
        assert error["code"] == "invalid_api_key"
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(model=url, api_key="wrong").text_to_image("goldfish")


# Bodies


@pytest.mark.parametrize(
    "path, content_type, start",
    [
        (GENERATIONS, "application/json", b'{"prompt": "'),
        (EDITS, "multipart/form-data; boundary=x", FILE),
        ("/", "application/json", b'{"inputs": "'),
    ],
)
def test_bodies_that_are_too_large_get_413(server, path, content_type, start):
    """The limit is 1 MiB."""

    def chunks(count: int):
        yield start
        for _ in range(count):
            yield b"a" * 2**16

    for body in (b"a" * (2**20 + 1), start + b"a" * (40 * 2**20), chunks(17), chunks(600)):
        error = error_of(post(server, path, content=body, headers={"Content-Type": content_type}), 413)
        assert error["type"] == "invalid_request_error"


def test_a_length_that_is_too_large_is_refused_at_every_address(server):
    for path in ("/health", "/images/a.png", "/nothing", GENERATIONS):
        error_of(post(server, path, content=b"a" * (2**20 + 1)), 413)


def test_clients_raise_on_413(server):
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().images.edit(image=b"a" * (20 * 2**20), prompt="a fish")
    assert caught.value.status_code == 413
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().images.generate(prompt="a" * (20 * 2**20))
    assert caught.value.status_code == 413
    assert server.get("/health").status_code == 200


def test_errors_say_what_a_body_must_be(server):
    json_type = {"Content-Type": "application/json"}
    for body in (b"[]", b"[1]", b'"a"', b"3", b"null", b""):
        assert "JSON object" in error_of(post(server, content=body, headers=json_type), 400)["message"], body
    assert "JSON object" in error_of(post(server, data={"prompt": "a"}), 400)["message"]
    assert "JSON object" in error_of(post(server, content=b'{"prompt": "a"}'), 400)["message"]
    assert "not valid JSON" in error_of(post(server, content=b"{", headers=json_type), 400)["message"]
    assert "UTF-8" in error_of(post(server, content=b'{"prompt": "\xff"}', headers=json_type), 400)["message"]
    for content in (
        {"json": {"prompt": "a", "image": "a"}},
        {"content": b"a", "headers": {"Content-Type": "image/png"}},
    ):
        assert "multipart/form-data" in error_of(post(server, EDITS, **content), 400)["message"]
    big = {"prompt": "a" * 2**19, "n": "9" * 2**18}
    assert error_of(post(server, EDITS, data=big, files={"image": png(noise())}), 400)


@pytest.mark.parametrize(
    "value, param",
    [
        ('"n": true', "n"),
        ('"n": "2"', "n"),
        ('"n": 1.5', "n"),
        ('"n": 1e400', "n"),
        ('"n": -1', "n"),
        ('"seed": 9007199254740992', "seed"),
        ('"guidance_scale": NaN', "guidance_scale"),
        ('"temperature": Infinity', "temperature"),
        ('"stream": "false"', "stream"),
        ('"stream": 1', "stream"),
        ('"user": {}', "user"),
        ('"model": ""', "model"),
        ('"size": "512x512"', "size"),
        ('"prompt": ["a", "b"]', "prompt"),
        ('"prompt": ""', "prompt"),
        ('"background": "transparent"', "background"),
        ('"output_format": "gif"', "output_format"),
    ],
)
def test_wrong_values_of_json_name_their_field(server, value, param):
    body = ('{"prompt": "a", ' + value + "}").encode()
    error = error_of(post(server, content=body, headers={"Content-Type": "application/json"}), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_head_options_and_keys_of_others(server):
    for path in ("/health", "/ready", "/v1/models", "/v1/models/tiny"):
        answer = httpx.head(server.url + path)
        assert answer.status_code == 200 and answer.content == b""
    assert httpx.head(server.url + GENERATIONS).status_code == 405
    answer = httpx.options(server.url + GENERATIONS)
    assert error_of(answer, 405) and answer.headers["allow"] == "POST"
    for key in ("Bearer sk-anything", "Basic abc", "", "Bearer"):
        answer = post(server, json={"prompt": "a"}, headers={"Authorization": key})
        assert answer.status_code == 200


def talk(server: RunningServer, request: bytes) -> bytes:
    """What a raw socket gets."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_old_clients_and_odd_hosts(obliging_server):
    body = json.dumps({"prompt": "a fish", "seed": 3}).encode()
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    answer = talk(obliging_server, b"POST /v1/images/generations HTTP/1.0\r\n" + head + b"\r\n" + body)
    status, _, content = answer.partition(b"\r\n\r\n")
    assert b" 200 " in status.splitlines()[0]
    url = json.loads(content)["data"][0]["url"]
    assert httpx.get(url).status_code == 200
    for host in (b"[", b"a b", b"", b"]:x", b"a:b:c", b"\xff"):
        request = b"POST /v1/images/generations HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n" + head
        answer = talk(obliging_server, request + b"\r\n" + body)
        assert b" 500 " not in answer.splitlines()[0], host
        assert answer.splitlines()[0].split()[1] in (b"200", b"400"), host


@pytest.mark.parametrize(
    "options, status, sentence",
    [
        (["--response-format", "png"], 2, "'png' is not one of 'b64_json', 'url'"),
        (["--engine", "none"], 2, "'none' is not one of 'local', 'vllm'"),
        (["--dtype", "int8"], 2, "'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        (["--on-engine-death", "cry"], 2, "'cry' is not one of 'restart', 'exit'"),
        (["--cors-origins", "app.example"], 1, "`--cors-origins` holds 'app.example'"),
        (["--cors-origins", f"{ORIGIN},http://a.example/path"], 1, "`--cors-origins` holds 'http://a.example/path'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options, status, sentence):
    result = CliRunner().invoke(llamagen_cli.app, ["serve", "no-such-folder", *options])
    output = " ".join(result.output.replace("│", " ").split())  # typer draws a box around its errors
    assert result.exit_code == status and sentence in output
