"""What the server survives: crowds, malformed requests, clients that disconnect, an engine that is killed."""

import asyncio
import base64
import io
import json
import os
import random
import signal
import threading

import pytest


pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

import httpx  # noqa: E402
import openai  # noqa: E402
import psutil  # noqa: E402
from PIL import Image  # noqa: E402
from serving_client import RunningServer, running_command, running_server, save_text_checkpoint  # noqa: E402
from tiny import generators  # noqa: E402


GENERATIONS = "/v1/images/generations"
SETTINGS = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_scale": 7.0, "top_k": 20},
    {"guidance_scale": 2.0, "guidance_interval": 3, "temperature": 1.5},
    {"top_p": 0.8, "temperature": 0.6},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running_server(save_text_checkpoint(tmp_path_factory.mktemp("text")), max_pending=1000) as running:
        yield running


@pytest.fixture
def slow_server(tmp_path):
    """576 codes an image, and a queue of three."""
    folder = save_text_checkpoint(tmp_path, grid_size=24)
    with running_server(folder, slots=4, max_pending=3, max_images=3) as running:
        yield running


def crowd(server: RunningServer, bodies: list[dict]) -> list[httpx.Response]:
    """Answers to requests that are sent at once, each on a connection of its own."""

    async def ask():
        limits = httpx.Limits(max_connections=len(bodies))
        async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=300) as client:
            return await asyncio.gather(*(client.post(GENERATIONS, json=body) for body in bodies))

    return asyncio.run(ask())


def check_crowd(server: RunningServer, count: int) -> None:
    choose = random.Random(count)
    chosen = [choose.choice(SETTINGS) for _ in range(count)]
    bodies = [
        {"prompt": f"thing {choose.randrange(10**6)}", "seed": choose.randrange(10**9)} | settings
        for settings in chosen
    ]
    answers, pipe = crowd(server, bodies), server.pipe
    assert [answer.status_code for answer in answers] == [200] * count
    files = [base64.b64decode(answer.json()["data"][0]["b64_json"]) for answer in answers]
    for settings in SETTINGS:
        same = [
            i
            for i, body in enumerate(bodies)
            if {**body, "prompt": "", "seed": 0} == settings | {"prompt": "", "seed": 0}
        ]
        expected = pipe(
            [bodies[i]["prompt"] for i in same], generator=generators(*(bodies[i]["seed"] for i in same)), **settings
        )
        for i, image in zip(same, expected.images, strict=True):
            assert Image.open(io.BytesIO(files[i])).tobytes() == image.tobytes()
    assert len(set(files)) == count
    server.until(lambda: server.service.pending == 0)
    assert server.engine._queues == {}


def test_a_crowd_gets_its_own_images(server):
    check_crowd(server, 60)


def test_a_crowd_of_streams_has_a_preview_each(server):
    """A busy decoder leaves previews out, but neither the first one nor the image."""

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:

            async def stream(seed: int) -> list:
                events = await client.images.generate(
                    prompt="a fish", stream=True, partial_images=3, extra_body={"seed": seed, "top_k": 30}
                )
                return [event async for event in events]

            return await asyncio.gather(*(stream(seed) for seed in range(40)))

    expected = server.pipe(["a fish"] * 40, top_k=30, generator=generators(*range(40))).images
    for image, (first, *others, last) in zip(expected, asyncio.run(ask()), strict=True):
        assert first.type == "image_generation.partial_image" and first.partial_image_index == 0
        assert len(others) <= 2 and last.type == "image_generation.completed"
        assert Image.open(io.BytesIO(base64.b64decode(last.b64_json))).tobytes() == image.tobytes()


@pytest.mark.slow
def test_500_at_once_and_the_memory_returns(server):
    def resident() -> float:
        return sum(psutil.Process(pid).memory_info().rss for pid in (os.getpid(), server.engine.process.pid)) / 2**20

    check_crowd(server, 500)
    before = resident()
    for _ in range(2):
        check_crowd(server, 500)
    # Of 1000 images and their prompts; the result cache takes less than a kilobyte each.
    assert resident() - before < 30


def malformed_bodies() -> list[tuple[str, bytes]]:
    """Content types and bodies that must be refused."""
    names = "n seed guidance_scale guidance_interval temperature top_k top_p output_compression partial_images timeout"
    wrong = ["NaN", "Infinity", "-1e400", '"1"', "[]", "{}", '"../../etc/passwd"', "1e999"]
    values = [f'{{"prompt": "a", "{name}": {value}}}' for name in names.split() for value in wrong]
    values += [f'{{"prompt": {value}}}' for value in ("1", "null", "[]", "{}", "true", '""', '"\\ud800"')]
    values += [
        '{"prompt": "a", "n": 1000000000000000000000000}',
        '{"prompt": "a", "n": 0}',
        '{"prompt": "a", "size": "../../8x8"}',
        '{"prompt": "a", "model": "../../../etc/passwd"}',
        '{"prompt": "a", "output_format": "../png"}',
        '{"prompt": "a", "stream": "yes"}',
        '{"prompt": "a", "unknown": 1}',
        '{"prompt": "a", "prompt_embeds": [[1, 2]]}',
        '{"prompt": "a", "image": "file:///etc/passwd"}',
        '{"prompt": "a"',
        '{"prompt"',
        "{",
        "",
        "null",
        "[]",
        '"a"',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"prompt": "a", "n": ' + "9" * 10_000 + "}",
        '{"prompt": "' + "a" * 10 * 2**20 + '"}',
        '{"prompt": "' + "a" * 17 * 2**20 + '"}',
    ]
    bodies = [("application/json", value.encode()) for value in values]
    bodies += [("application/json", bytes(range(256))), ("application/json", b"\xff\xfe{}")]
    good = b'{"prompt": "a"}'
    bodies += [(kind, good) for kind in ("text/plain", "application/xml", "multipart/form-data", "", "a/b; c=\xe9")]
    return bodies


def malformed_forms() -> list[dict]:
    """Arguments of httpx for completions that must be refused."""
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    upload = ("../../../../tmp/p.png", png.getvalue())
    truncated = (upload[0], png.getvalue()[:-30])
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    forms = [{"data": {"prompt": "a"}, "files": {"image": file}} for file in (("p", b""), ("p", b"GIF89a"), truncated)]
    forms += [
        {"data": {"prompt": "a", name: value}, "files": {"image": upload}}
        for name, value in [
            ("keep_rows", "4"),
            ("keep_rows", "-1"),
            ("keep_rows", "x"),
            ("n", "nan"),
            ("top_p", "inf"),
        ]
    ]
    forms += [
        {"data": {"prompt": "a", "image": base64.b64encode(png.getvalue()).decode()}},
        {"data": {"prompt": "a", "image": "file:///etc/passwd"}},
        {"data": {"prompt": "a", "image": "http://127.0.0.1/image.png"}},
        {"files": {"image": upload}},
        {"content": b"--x\r\n", "headers": headers},
        {"content": b'--x\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n', "headers": headers},
        {"json": {"prompt": "a", "image": base64.b64encode(png.getvalue()).decode() + "%%%"}},
    ]
    return forms


def test_malformed_requests_are_refused(server):
    """A good request beside them is not affected."""
    bodies, forms = malformed_bodies(), malformed_forms()
    assert len(bodies) + len(forms) >= 100
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answers = [
            (body[:60], client.post(GENERATIONS, content=body, headers={"Content-Type": kind.encode("latin-1")}))
            for kind, body in bodies
        ]
        answers += [(str(form)[:60], client.post("/v1/images/edits", **form)) for form in forms]
        answers += [
            ("path", client.get(path)) for path in ("/v1/nothing", "/v1/models/..%2f..%2fetc", "/images/a%00b")
        ]
        answers += [("method", client.get(GENERATIONS)), ("method", client.delete("/v1/models"))]
        good = client.post(GENERATIONS, json={"prompt": "a fish"})
    for sent, answer in answers:
        assert 400 <= answer.status_code < 500, (sent, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error", sent
        assert len(answer.content) < 500 and "Traceback" not in answer.text and "/work" not in answer.text
    assert good.status_code == 200 and server.get("/ready").status_code == 200


def test_a_killed_engine_comes_back(server):
    results = []

    def ask():
        try:
            results.append(server.client().images.generate(prompt="a fish", n=10))
        except openai.APIError as error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    server.until(lambda: server.service.pending > 20)
    os.kill(server.engine.process.pid, signal.SIGKILL)
    server.until(lambda: server.get("/ready").status_code == 503)
    assert server.get("/ready").json() == {"status": "engine not ready"} and server.get("/health").status_code == 200
    with pytest.raises(openai.InternalServerError) as caught:
        server.client().images.generate(prompt="a fish")
    assert caught.value.status_code == 503 and caught.value.code == "engine_not_ready"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join(60)
    errors = [result for result in results if isinstance(result, Exception)]
    assert len(results) == 20 and errors
    assert {error.status_code for error in errors} == {503}
    server.until_ready()
    assert server.service.pending == 0
    check_crowd(server, 20)


def test_queue_cancellation_and_a_graceful_end(slow_server):
    """One server for all three, since each start takes seconds."""
    server, url = slow_server, slow_server.url + GENERATIONS
    engine = server.engine

    # Clients that disconnect, one of them before its first event.
    for stream in (False, True):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(url, json={"prompt": "a fish", "n": 3, "stream": stream}, timeout=0.4)
        server.until(lambda: server.service.pending == 0, seconds=2)
    server.until(lambda: engine.statistics.get("drawing") == 0)
    stream = server.client().images.generate(prompt="a fish", n=3, stream=True, partial_images=20)
    assert next(stream).type == "image_generation.partial_image"
    stream.close()
    server.until(lambda: server.service.pending == 0, seconds=2)
    assert server.metric("llamagen_cancelled_images_total") >= 7

    # A full queue.
    stream = server.client().images.generate(
        prompt="a fish", n=3, stream=True, partial_images=20, extra_body={"seed": 1}
    )
    next(stream)
    with pytest.raises(openai.RateLimitError) as caught:
        server.client().images.generate(prompt="a fish")
    assert caught.value.code == "queue_full" and int(caught.value.response.headers["retry-after"]) >= 1

    # SIGTERM: active requests are finished.
    server.server.handle_exit(signal.SIGTERM, None)
    assert server.get("/ready").json() == {"status": "shutting down"} and server.get("/ready").status_code == 503
    with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
        server.client().images.generate(prompt="a fish")
    assert caught.value.status_code == 503
    finished = [event for event in stream if event.type == "image_generation.completed"]
    assert sorted(event.seed for event in finished) == [1, 2, 3]
    server.thread.join(30)
    assert not server.thread.is_alive() and not engine.process.is_alive()


@pytest.mark.slow
def test_the_command_ends_gracefully_on_sigterm(tmp_path):
    folder, answers = save_text_checkpoint(tmp_path / "slow", grid_size=24), []
    with running_command(folder, tmp_path / "log", "--model-name", "slow") as running:
        url = running.url
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(url + GENERATIONS, json={"prompt": "a fish"}, timeout=120))
        )
        thread.start()
        while "llamagen_pending_images 1.0" not in httpx.get(url + "/metrics", timeout=60).text:
            threading.Event().wait(0.05)
        running.process.send_signal(signal.SIGTERM)
        thread.join(120)
        assert answers[0].status_code == 200
        assert running.process.wait(30) == 0
    # Libraries write there, too.
    lines = [json.loads(line) for line in running.log.read_text().splitlines() if line.startswith("{")]
    (request,) = [line for line in lines if line["message"] == "request"]
    assert request["status"] == 200 and request["route"] == GENERATIONS and "fish" not in str(lines)


@pytest.mark.slow
def test_the_command_ends_with_its_engine_if_told_so(tmp_path):
    folder = save_text_checkpoint(tmp_path / "checkpoint")
    with running_command(folder, tmp_path / "log", "--on-engine-death", "exit") as running:
        (engine,) = [one for one in psutil.Process(running.process.pid).children(recursive=True) if is_engine(one)]
        engine.kill()
        assert running.process.wait(60) == 1
    assert "Error: The engine died." in running.log.read_text()


def is_engine(process: psutil.Process) -> bool:
    """Of the processes below the server, the one that holds a model: it is a child of the fork server."""
    return process.memory_info().rss > 100 * 2**20 and not process.children()


@pytest.mark.slow
def test_schemathesis_finds_nothing(server):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    # A schema can't say which bytes are an image.
    no_image = [positive_data_acceptance]
    schema, tried = schemathesis.openapi.from_url(f"{server.url}/openapi.json"), set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def fuzz(case):
            answer = case.call(timeout=60)
            if b"unreadable_prompt" in answer.content:  # as a schema can't say which characters mean nothing
                assert answer.status_code == 400
            elif answer.status_code == 504:  # which is right, but no server's error, if that was asked for
                assert float((case.body.get("parameters") or case.body)["timeout"]) < 5
            else:
                case.validate_response(answer, excluded_checks=no_image if "edits" in case.path else None)

        fuzz()
        tried.add(operation.path)
    assert {GENERATIONS, "/v1/images/edits", "/v1/models", "/images/{name}", "/ready", "/metrics"} <= tried
