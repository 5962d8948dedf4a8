"""OpenAI's client against the server: generations, streams, edits, and errors of its own types."""

import base64
import io
import json

import httpx
import openai
import pytest
from PIL import Image
from serving_client import running_server, save_text_checkpoint
from tiny import build_class_pipeline, generators

from llamagen_hf.provenance import read_parameters


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = save_text_checkpoint(tmp_path_factory.mktemp("text"))
    with running_server(folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def read_b64(b64_json: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(b64_json)))
    image.load()
    return image


def same(image: Image.Image, other: Image.Image) -> bool:
    return image.size == other.size and image.convert("RGB").tobytes() == other.tobytes()


def test_images_are_those_of_the_pipeline(server, client):
    answer = client.images.generate(
        prompt="a Red apple", n=3, size="8x8", extra_body={"seed": 5, "guidance_scale": 3.0, "top_k": 40}
    )
    expected = server.pipe(["a Red apple"] * 3, guidance_scale=3.0, top_k=40, generator=generators(5, 6, 7))
    assert [data.seed for data in answer.data] == [5, 6, 7]
    for data, image in zip(answer.data, expected.images, strict=True):
        assert same(read_b64(data.b64_json), image)
    assert answer.size == "8x8" and answer.output_format == "png" and answer.created > 1e9
    assert answer.usage.output_tokens == 48
    assert answer.usage.input_tokens == answer.usage.input_tokens_details.text_tokens > 3


def test_without_a_seed_images_differ_and_say_theirs(server, client):
    images = client.images.generate(prompt="a fish", n=2).data
    assert images[0].b64_json != images[1].b64_json and images[0].seed + 1 == images[1].seed
    again = client.images.generate(prompt="a fish", extra_body={"seed": images[1].seed}).data
    assert again[0].b64_json == images[1].b64_json


def test_a_png_holds_the_parameters_that_redraw_it(server, client, tmp_path):
    data = client.images.generate(prompt="a fish", extra_body={"seed": 3, "temperature": 0.5}).data[0]
    path = tmp_path / "fish.png"
    path.write_bytes(base64.b64decode(data.b64_json))
    parameters = read_parameters(path)
    assert parameters["prompt"] == "a fish" and parameters["seed"] == 3 and parameters["checkpoint"] == "tiny"
    assert same(Image.open(path), server.pipe.redraw(parameters).images[0])


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_formats(client, output_format):
    sizes = []
    for compression in (100, 10):
        data = client.images.generate(
            prompt="a fish", output_format=output_format, output_compression=compression, extra_body={"seed": 1}
        )
        image = read_b64(data.data[0].b64_json)
        assert image.format == output_format.upper() and image.size == (8, 8)
        sizes.append(len(data.data[0].b64_json))
    assert sizes[0] > sizes[1]


def test_addresses(server, client):
    url = client.images.generate(prompt="a fish", response_format="url", extra_body={"seed": 1}).data[0].url
    answer = httpx.get(url)
    assert url.startswith(server.url + "/images/") and answer.headers["content-type"] == "image/png"
    plain = client.images.generate(prompt="a fish", extra_body={"seed": 1}).data[0]
    assert answer.content == base64.b64decode(plain.b64_json)
    for name in ("nothing.png", "../../etc/passwd", "%2e%2e%2fetc%2fpasswd", url[-8:]):
        assert server.get(f"/images/{name}").status_code == 404


def test_streams_previews_and_the_image(server, client):
    stream = client.images.generate(
        prompt="a fish", stream=True, partial_images=3, extra_body={"seed": 11, "guidance_scale": 2.0}
    )
    *previews, last = list(stream)
    assert previews and all(event.type == "image_generation.partial_image" for event in previews)
    assert [event.partial_image_index for event in previews] == list(range(len(previews)))
    assert last.type == "image_generation.completed" and last.seed == 11 and last.usage.total_tokens > 16
    expected = server.pipe("a fish", guidance_scale=2.0, generator=generators(11)).images[0]
    assert same(read_b64(last.b64_json), expected)
    for event in previews:
        shown = read_b64(event.b64_json)
        assert shown.size == (8, 8) and not same(shown, expected) and event.size == "8x8"
    # The first 4 of 16 codes are the first row of the image, and the grey below is not part of it.
    pixels = read_b64(previews[0].b64_json).convert("RGB")
    assert len({pixels.getpixel((x, 7)) for x in range(8)}) == 1


def test_streams_several_images(client):
    events = list(client.images.generate(prompt="a fish", n=3, stream=True, extra_body={"seed": 20}))
    assert sorted(event.image_index for event in events) == [0, 1, 2]
    assert {event.seed for event in events} == {20, 21, 22}


def test_edits_an_image(server, client):
    upload = Image.effect_noise((30, 20), 90).convert("RGB")
    file = io.BytesIO()
    upload.save(file, "PNG")
    fields = {"seed": 2, "guidance_scale": 2.0}
    for keep_rows in (0, 3, None):
        given = {} if keep_rows is None else {"keep_rows": keep_rows}
        answer = client.images.edit(
            image=("../../up load.png", file.getvalue()), prompt="a fish", extra_body=fields | given
        )
        expected = server.pipe(
            "a fish",
            guidance_scale=2.0,
            image=upload,
            keep_rows=2 if keep_rows is None else keep_rows,
            generator=generators(2),
        )
        assert same(read_b64(answer.data[0].b64_json), expected.images[0])
    odd = io.BytesIO()
    upload.save(odd, "PNG", exif=b"b'II*'")  # which Pillow can't read
    again = client.images.edit(image=odd.getvalue(), prompt="a fish", extra_body=fields)
    assert again.data[0].b64_json == answer.data[0].b64_json
    assert answer.usage.input_tokens_details.image_tokens == 8 and answer.usage.output_tokens == 8
    *_, last = client.images.edit(
        image=file.getvalue(), prompt="a fish", stream=True, partial_images=1, extra_body=fields
    )
    assert last.type == "image_edit.completed" and last.b64_json == answer.data[0].b64_json


def test_models(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llamagen"
    assert client.images.generate(model="tiny", prompt="a fish", quality="hd", style="vivid", user="me").data
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"n": 11}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a" * 2001}, "prompt"),
        ({"size": "1024x1024"}, "size"),
        ({"model": "dall-e-3"}, "model"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"),
        ({"response_format": "path"}, "response_format"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"class_label": 3}, "class_label"),
        ({"guidence_scale": 3}, "guidence_scale"),
        ({"partial_images": -1, "stream": True}, "partial_images"),
    ],
)
def test_wrong_values_are_bad_requests(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a fish"}, extra_body=fields)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert len(caught.value.body["message"]) < 300


@pytest.mark.parametrize("prompt", ["   ", "\u200b", "\ufe0f"])
def test_a_prompt_that_can_not_be_read_is_a_bad_request(client, prompt):
    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(prompt=prompt)
    assert error.value.param == "prompt" and error.value.code == "unreadable_prompt"
    assert "can read nothing of the prompt" in error.value.body["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_cut_has_a_warning_in_the_headers(server, stream, monkeypatch):
    logged = []
    monkeypatch.setattr("llamagen_hf.llamagen.encoding.logger.warning_once", logged.append)
    url = f"{server.url}/v1/images/generations"
    answer = httpx.post(url, json={"prompt": "apples and péars", "stream": stream}, timeout=60)
    assert answer.status_code == 200 and "leaves out its end: 'p\\u00e9ars'" in answer.headers["Warning"]
    assert "Warning" not in httpx.post(url, json={"prompt": "apples", "stream": stream}, timeout=60).headers
    assert not logged  # prompts are not for the log


def test_wrong_uploads_are_bad_requests(client):
    for image in (b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(openai.BadRequestError, match="image"):
            client.images.edit(image=("image.png", image), prompt="a fish")
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=file.getvalue(), prompt="a fish", extra_body={"keep_rows": 4})
    assert caught.value.param == "keep_rows"


def test_the_openapi_page_says_what_this_checkpoint_takes(server):
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    body = schemas["ImageGeneration"]["properties"]
    assert body["size"]["anyOf"] == [{"type": "string", "enum": ["auto", "8x8"]}, {"type": "null"}]
    assert "class_label" not in body and schemas["ImageGeneration"]["required"] == ["prompt"]
    assert schemas["ImageEdit"]["required"] == ["prompt"]


def test_the_cache_answers_without_the_engine(server, client):
    fields = {"prompt": "a cached fish", "n": 2, "extra_body": {"seed": 77, "top_k": 9}}
    first = client.images.generate(**fields)
    hits, drawn = (
        server.metric('llamagen_images_total{source="cache"}'),
        server.metric('llamagen_images_total{source="drawn"}'),
    )
    server.engine.is_ready = False  # whoever needs it now gets 503
    try:
        assert client.images.generate(**fields).data == first.data
        (event,) = client.images.generate(**fields | {"n": 1}, stream=True, partial_images=2)
        assert event.type == "image_generation.completed" and event.b64_json == first.data[0].b64_json
        assert server.metric('llamagen_images_total{source="cache"}') == hits + 3
        assert server.metric('llamagen_images_total{source="drawn"}') == drawn
        for change in ({"seed": 78}, {"top_k": 8}, {"temperature": 0.9}, {"guidance_interval": 3}, {"seed": None}):
            with pytest.raises(openai.InternalServerError, match="not ready"):
                client.images.generate(**fields | {"extra_body": fields["extra_body"] | change})
        for change in ({"prompt": "another fish"}, {"output_format": "jpeg"}):
            with pytest.raises(openai.InternalServerError, match="not ready"):
                client.images.generate(**fields | change)
    finally:
        server.engine.is_ready = True


def test_metrics_and_health(server, client):
    client.images.generate(prompt="a fish", stream=True, partial_images=1).response.read()
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    assert server.metric("llamagen_engine_ready") == 1
    assert server.metric("llamagen_first_preview_seconds_count") >= 1
    assert server.metric('llamagen_requests_total{route="/v1/images/generations",status="200"}') >= 1
    server.until(lambda: server.metric("llamagen_pending_images") == 0)
    answer = server.get("/health")
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_request_that_takes_too_long(server, client):
    with pytest.raises(openai.InternalServerError) as caught:
        server.client(max_retries=2).images.generate(prompt="a fish", extra_body={"timeout": 0.001})
    assert caught.value.status_code == 504 and caught.value.code == "timeout"
    server.until(lambda: server.metric("llamagen_pending_images") == 0)


def test_logs_hold_no_prompts(server, client, caplog):
    import logging

    logger = logging.getLogger("llamagen_hf.serving")
    logger.propagate, before = True, logger.propagate
    try:
        client.images.generate(prompt="a secret fish", extra_body={"seed": 4})
        server.until(lambda: any(record.message == "request" for record in caplog.records))
    finally:
        logger.propagate = before
    record = next(record for record in caplog.records if record.message == "request")
    assert record.status == 200 and record.route == "/v1/images/generations" and record.n == 1
    assert record.seconds > 0 and record.cached == 0 and record.request_id.startswith("req_")
    assert "secret" not in json.dumps(vars(record), default=str)


def test_class_checkpoints_take_class_labels(tmp_path):
    pipe = build_class_pipeline()
    pipe.save_pretrained(tmp_path)
    with running_server(tmp_path, api_key="open sesame", rate_limit="14/minute", log_prompts=True) as server:
        with pytest.raises(openai.AuthenticationError) as caught:
            server.client(api_key="open").images.generate(prompt="goldfish")
        assert caught.value.code == "invalid_api_key"
        assert httpx.post(server.url + "/v1/images/generations", json={}).status_code == 401
        client = server.client(api_key="open sesame")
        fields = {"seed": 1, "guidance_scale": 2.0}
        expected = pipe(class_labels="goldfish", guidance_scale=2.0, generator=generators(1)).images[0]
        for condition in ({"prompt": "goldfish"}, {"prompt": "", "class_label": 1}, {"class_label": "goldfish"}):
            data = client.images.generate(prompt="", extra_body=fields | condition).data[0]
            assert same(read_b64(data.b64_json), expected)
        upload = io.BytesIO()
        Image.new("RGB", (8, 8)).save(upload, "PNG")
        for label in ("1", "goldfish"):  # all fields of a form are text
            answer = httpx.post(
                f"{server.url}/v1/images/edits", files={"image": upload.getvalue()},
                data={"class_label": label, "keep_rows": "0", "seed": "1", "guidance_scale": "2.0"},
                headers={"Authorization": "Bearer open sesame"}, timeout=60,
            )  # fmt: skip
            assert answer.status_code == 200 and same(read_b64(answer.json()["data"][0]["b64_json"]), expected)
        for condition in (
            {"class_label": 10},
            {"class_label": "unicorn"},
            {"prompt": "", "class_label": None},
            {"prompt": "a fish", "class_label": 1},
        ):
            with pytest.raises(openai.BadRequestError):
                client.images.generate(prompt="", extra_body=condition)
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(14):
                client.models.list()
        assert (
            caught.value.code == "rate_limit_exceeded" and 0 < int(caught.value.response.headers["retry-after"]) <= 60
        )
        assert server.get("/ready").status_code == 200
