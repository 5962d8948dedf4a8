"""The app as scripts use it, through gradio_client, with tiny models."""

import functools
import inspect
import io
import json
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import build_class_pipeline, build_text_pipeline, build_transformer, build_vq_model, generators
from tiny_cascade import build_cascade


pytest.importorskip("gradio")

import gradio as gr  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from demo_client import arguments, running, shown_images  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from llamagen_hf import AutoregressiveImagePipeline  # noqa: E402
from llamagen_hf.demo import build_demo  # noqa: E402
from llamagen_hf.demo import studio as studio_module  # noqa: E402
from llamagen_hf.demo.app import read_examples  # noqa: E402
from llamagen_hf.demo.studio import UNDRAWN, Studio  # noqa: E402
from llamagen_hf.images.transforms import center_crop  # noqa: E402
from llamagen_hf.llamagen.preview import decode_partly  # noqa: E402
from llamagen_hf.provenance import read_parameters  # noqa: E402


SPACE = Path(__file__).parents[2] / "spaces" / "llamagen"


@pytest.fixture(scope="module")
def app():
    pipe = build_text_pipeline()
    with running(pipe) as url:
        yield pipe, url


@pytest.fixture(scope="module")
def client(app):
    return Client(app[1], verbose=False)


def alone(pipe, seed, prompt="a red apple"):
    return pipe(prompt, guidance_scale=2.0, top_k=0, generator=generators(seed)).images[0]


def test_images_equal_the_pipelines(app, client):
    gallery, status, parameters, share = client.predict(*arguments(count=3), api_name="/draw")
    images = shown_images(gallery)
    assert [image.tobytes() for image in images] == [alone(app[0], seed).tobytes() for seed in (3, 4, 5)]
    assert re.fullmatch(r"3 images in \d+\.\d s", status)
    assert [facts["seed"] for facts in json.loads(parameters)] == [3, 4, 5]
    entries = gallery["value"] if isinstance(gallery, dict) else gallery
    assert [entry["caption"] for entry in entries] == ["seed 3", "seed 4", "seed 5"]


def test_files_carry_their_parameters_and_the_shared_one_is_large(app, client):
    gallery, _, parameters, share = client.predict(*arguments(), api_name="/draw")
    entries = gallery["value"] if isinstance(gallery, dict) else gallery
    facts = read_parameters(entries[0]["image"])
    assert facts == json.loads(parameters) == read_parameters(share["value"] if isinstance(share, dict) else share)
    assert facts["prompt"] == "a red apple" and facts["seed"] == 3
    assert app[0].redraw(facts).images[0].tobytes() == shown_images(gallery)[0].tobytes()
    with Image.open(share["value"] if isinstance(share, dict) else share) as image:
        assert image.format == "PNG" and image.size == (512, 512)


def test_previews_arrive_row_by_row(app, client):
    job = client.submit(*arguments(), api_name="/draw")
    *frames, last = list(job)
    assert [frame[1] for frame in frames] == ["25%", "50%", "75%"]
    contents = [shown_images(frame[0])[0].tobytes() for frame in [*frames, last]]
    assert len(set(contents)) == 4 and contents[-1] == alone(app[0], 3).tobytes()


def test_the_best_of_several_candidates_is_shown(app, client):
    job = client.submit(*arguments(seed="5", count=2), 4, api_name="/draw")
    *frames, (gallery, status, parameters, _) = list(job)
    # Before the best is known, the first is shown, which is the image that is drawn without others.
    firsts = client.submit(*arguments(seed="5", count=2), api_name="/draw")
    for frame, first in zip(frames, firsts, strict=False):
        assert [image.tobytes() for image in shown_images(frame[0])] == [
            image.tobytes() for image in shown_images(first[0])
        ]
    best = app[0]("a red apple", guidance_scale=2.0, top_k=0, num_images_per_prompt=2, num_candidates=4,
                  generator=generators(5, 6))  # fmt: skip
    assert len(frames) == 3 and status.startswith("2 images in")
    assert [image.tobytes() for image in shown_images(gallery)] == [image.tobytes() for image in best.images]
    redrawn = [app[0].redraw(facts).images[0].tobytes() for facts in json.loads(parameters)]
    assert redrawn == [image.tobytes() for image in best.images]


def test_previews_can_be_off_and_without_a_seed_there_is_one_anyway(client):
    job = client.submit(*arguments(seed="", preview="off"), api_name="/draw")
    *rows, result = list(job)
    assert [row[1] for row in rows] == ["25%", "50%", "75%"]
    assert not any(isinstance(row[0], list) or "value" in row[0] for row in rows)
    assert json.loads(result[2])["seed"] < 2**31
    assert (
        json.loads(client.predict(*arguments(seed=""), api_name="/draw")[2])["seed"] != json.loads(result[2])["seed"]
    )


def test_clients_of_the_api_need_only_a_prompt(app, client, tmp_path):
    facts = json.loads(client.predict("a fish", api_name="/draw")[2])
    assert facts["prompt"] == "a fish"
    assert facts | app[0].sampling_settings() == facts
    assert json.loads(client.predict("a fish", api_name="/draw")[2])["seed"] != facts["seed"]
    for seed in (0, 7):
        assert json.loads(client.predict("a fish", seed=seed, api_name="/draw")[2])["seed"] == seed
    image = upload(tmp_path, "own.png", save(alone(app[0], 9), "PNG"))
    facts = json.loads(client.predict(image, condition="a fish", api_name="/complete")[2])
    assert len(facts["prefix_codes"]) == 8
    parameters = client.view_api(return_format="dict")["named_endpoints"]
    required = {
        name: [one["parameter_name"] for one in endpoint["parameters"] if not one["parameter_has_default"]]
        for name, endpoint in parameters.items()
    }
    assert required == {"/draw": ["condition"], "/complete": ["image", "condition"]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": "  "}, "Type a prompt first"),
        ({"prompt": "\u200b"}, "This checkpoint can read nothing of the prompt"),
        ({"prompt": "long " * 200}, "it has 999 characters, at most 500"),
        ({"seed": "-1"}, "'-1' is not a whole number"),
        ({"seed": "abc"}, "'abc' is not a whole number"),
        ({"seed": str(2**70)}, "not a whole number from 0"),
        ({"count": 99}, "99"),
        ({"scale": -3}, "-3"),
    ],
)
def test_wrong_requests_are_refused_in_words(client, changes, message):
    with pytest.raises((AppError, ValueError), match=re.escape(message)) as refused:
        client.predict(*arguments(**changes), api_name="/draw")
    assert "Traceback" not in str(refused.value)


def save(image, suffix, **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def upload(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return handle_file(str(path))


def complete(client, image, rows=2, **changes):
    return client.predict(image, rows, *arguments(**changes), api_name="/complete")


def test_a_completion_keeps_the_images_codes(app, client, tmp_path):
    image = alone(app[0], 9)
    gallery, _, parameters, _ = complete(client, upload(tmp_path, "own.png", save(image, "PNG")))
    own = app[0].encode_image(image)[0, :2].flatten().tolist()
    assert json.loads(parameters)["prefix_codes"] == own
    expected = app[0]("a red apple", guidance_scale=2.0, image=image, keep_rows=2, generator=generators(3))
    assert shown_images(gallery)[0].tobytes() == expected.images[0].tobytes()


def test_uploads_of_all_kinds_are_completed(app, client, tmp_path):
    base = Image.effect_noise((40, 30), 90).convert("RGB")
    turned = Image.Exif()
    turned[274] = 6
    frames = [base, base.rotate(90)]
    for name, content in {
        "large.jpg": save(base.resize((4000, 3000)), "JPEG"),
        "dot.png": save(Image.new("RGB", (1, 1), "red"), "PNG"),
        "strip.png": save(Image.new("RGB", (3, 4000), "blue"), "PNG"),
        "animated.gif": save(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "turned.jpg": save(base, "JPEG", exif=turned),
        "alpha.png": save(Image.new("RGBA", (9, 9), (255, 0, 0, 40)), "PNG"),
        "palette.png": save(base.convert("P"), "PNG"),
        "wrong-name.txt": save(base, "PNG"),
        "deep.tiff": save(Image.new("I;16", (9, 9), 40000), "TIFF"),
        "broken-exif.png": save(base, "PNG", exif=b"b'II*'"),
    }.items():
        parameters = json.loads(complete(client, upload(tmp_path, name, content), preview="off")[2])
        own = app[0].encode_image(Image.open(io.BytesIO(content)))[0, :2].flatten().tolist()
        assert parameters["prefix_codes"] == own, name


def test_uploads_that_are_not_images_are_refused_in_words(client, tmp_path):
    whole = save(Image.effect_noise((64, 64), 90).convert("RGB"), "PNG")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
    for name, content, message in [
        ("cut.png", whole[: len(whole) // 2], "it is damaged .image file is truncated"),
        ("text.png", b"no image at all", "not in a known format"),
        ("empty.png", b"", "not in a known format"),
        ("drawing.svg", svg, "not in a known format"),
        ("huge.png", save(Image.new("1", (9000, 8000)), "PNG"), "72 megapixels, at most 64"),
        ("bomb.png", save(Image.new("1", (20000, 20000)), "PNG"), "at most 64 megapixels"),
    ]:
        with pytest.raises(AppError, match=message) as refused:
            complete(client, upload(tmp_path, name, content))
        assert "/" not in str(refused.value).replace("PNG, ", ""), name  # no path of the server
    with pytest.raises(AppError, match="Choose an image first"):
        complete(client, None)


@pytest.mark.slow
def test_twenty_clients_get_their_own_images_and_memory_returns(app):
    pipe, url = app
    expected = {seed: alone(pipe, seed, f"image {seed}").tobytes() for seed in range(20)}
    clients = [Client(url, verbose=False) for _ in range(20)]

    def ask(seed):
        result = clients[seed].predict(*arguments(f"image {seed}", str(seed)), api_name="/draw")
        return seed, shown_images(result[0])[0].tobytes()

    def everyone():
        with ThreadPoolExecutor(20) as pool:
            return dict(pool.map(ask, range(20)))

    assert everyone() == expected and len(set(expected.values())) == 20
    everyone()
    before = psutil.Process().memory_info().rss
    everyone()
    assert psutil.Process().memory_info().rss - before < 40e6
    assert len(pipe.decoder._spare_caches) == 1


@pytest.fixture
def slow_pipe(monkeypatch):
    """A pipeline whose steps take their time and are counted."""
    pipe = build_text_pipeline()
    forward, steps = pipe.transformer.forward, []

    def slow(*args, **kwargs):
        steps.append(time.perf_counter())
        time.sleep(0.05)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", slow)
    return pipe, steps


def test_a_cancelled_generation_stops_working(slow_pipe):
    pipe, steps = slow_pipe
    with running(pipe) as url:
        job = Client(url, verbose=False).submit(*arguments(), api_name="/draw")
        next(iter(job))
        job.cancel()
        time.sleep(0.5)  # for the row that was under way
        done = len(steps)
        assert done < 16
        time.sleep(0.5)
        assert len(steps) == done
        steps.clear()
        assert shown_images(Client(url, verbose=False).predict(*arguments(), api_name="/draw")[0])
        assert len(steps) == 16


@pytest.mark.slow
def test_a_full_queue_says_so_and_serves_the_others(slow_pipe):
    pipe, _ = slow_pipe
    with running(pipe, queue_size=2) as url:
        clients = [Client(url, verbose=False) for _ in range(6)]

        def ask(client):
            try:
                return shown_images(client.predict(*arguments(), api_name="/draw")[0])[0].tobytes()
            except Exception as error:
                return str(error)

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, clients))
    drawn = [answer for answer in answers if isinstance(answer, bytes)]
    refused = [answer for answer in answers if isinstance(answer, str)]
    assert len(drawn) >= 2 and refused and len(set(drawn)) == 1
    assert all("Queue is full" in answer for answer in refused)


@pytest.mark.parametrize("named", [True, False])
def test_a_class_conditional_checkpoint_asks_for_a_class(named):
    pipe = build_class_pipeline()
    if not named:
        pipe = AutoregressiveImagePipeline(pipe.vq_model, build_transformer(id2label=None))
        pipe.set_progress_bar_config(disable=True)
    assert read_examples(pipe, None) == [0, 2, 4, 6, 8]
    with running(pipe) as url:
        client = Client(url, verbose=False)
        gallery, *_ = client.predict(*arguments(4), api_name="/draw")
        expected = pipe(class_labels=4, guidance_scale=2.0, top_k=0, generator=generators(3)).images[0]
        assert shown_images(gallery)[0].tobytes() == expected.tobytes()
        with pytest.raises((AppError, ValueError)):
            client.predict(*arguments(77), api_name="/draw")


@pytest.mark.parametrize("build, further", [(build_text_pipeline, ()), (build_cascade, (0.2, 3, 1.0))])
def test_what_goes_to_and_from_a_lent_gpu_can_be_pickled(monkeypatch, build, further):
    wrapped = []

    def GPU(function):  # as on ZeroGPU, where the function runs in a process of its own, ahead of who reads it
        wrapped.append(function)

        @functools.wraps(function)
        def run(*args):
            yield from [pickle.loads(pickle.dumps(value)) for value in function(*pickle.loads(pickle.dumps(args)))]

        return run

    monkeypatch.setattr(studio_module, "GPU", GPU)
    studio = Studio(build())
    assert inspect.isgeneratorfunction(wrapped[0])
    *frames, last = studio.draw(*arguments(count=2), *further, 1)
    assert len(frames) == (6 if further else 3) and len(json.loads(last[2])) == 2


def test_what_is_kept_is_shown_without_a_device(tmp_path):
    image = Image.effect_noise((24, 16), 90).convert("RGB")
    image.save(tmp_path / "noise.png")
    studio = Studio(build_text_pipeline().to("meta"))  # on ZeroGPU none is lent for this
    gallery, status = studio.keep(str(tmp_path / "noise.png"), 1)
    ((shown, _),) = gallery["value"]
    assert status == "This part is kept." and shown.size == (8, 8)
    upper, lower = shown.crop((0, 0, 8, 2)), shown.crop((0, 2, 8, 8))
    assert upper.tobytes() == center_crop(image, 8).crop((0, 0, 8, 2)).tobytes()
    assert lower.getcolors() == [(48, UNDRAWN)]
    undrawn = decode_partly(build_vq_model(), torch.zeros(1, 0).long(), 4)[0, :, 0, 0]
    assert UNDRAWN == tuple(((undrawn + 1) * 127.5).round().int().tolist())
    assert studio.keep(str(tmp_path / "noise.png"), 0)[1] == "Nothing is kept."


def test_an_unexpected_error_is_a_sentence_too(monkeypatch):
    pipe = build_text_pipeline()

    def fail(*args, **kwargs):
        raise RuntimeError("/home/someone/secret")

    monkeypatch.setattr(pipe.transformer, "forward", fail)
    with (
        running(pipe) as url,
        pytest.raises(AppError, match="The generation failed. The app's log says why.") as refused,
    ):
        Client(url, verbose=False).predict(*arguments(), api_name="/draw")
    assert "secret" not in str(refused.value)


def test_a_grid_says_what_its_images_have_in_common(client):
    *_, parameters, share = client.predict(*arguments(count=2), api_name="/draw")
    facts = read_parameters(share["value"] if isinstance(share, dict) else share)
    assert facts["seeds"] == [3, 4] and facts["prompt"] == "a red apple" and "seed" not in facts
    assert len(json.loads(parameters)) == 2


def test_examples_come_from_the_checkpoints_card(tmp_path):
    pipe = AutoregressiveImagePipeline.from_pretrained()
    examples = read_examples(pipe, None)
    assert "a red heart" in examples and len(examples) == 5
    build_text_pipeline().save_pretrained(tmp_path)
    assert "a red apple" in read_examples(build_text_pipeline(), str(tmp_path))


def test_nobody_reads_a_path_of_the_server(tmp_path):
    build_text_pipeline().save_pretrained(tmp_path)
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    found = []
    for _, _, parameters, share in Studio(pipe).draw(*arguments(), 1):
        if isinstance(parameters, str) and parameters:  # at the end; the file is gone once its reader goes on
            found += [json.loads(parameters), read_parameters(share["value"])]
    assert [facts["checkpoint"] for facts in found] == [tmp_path.name] * 2
    demo = build_demo(str(tmp_path))
    assert tmp_path.name in demo.title and str(tmp_path) not in json.dumps(demo.get_config_file(), default=str)


def test_the_spaces_files_fit_together():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(text.split("---")[1])
    assert facts["sdk"] == "gradio" and facts["sdk_version"] == gr.__version__
    assert (SPACE / facts["app_file"]).is_file()
    assert len(facts["short_description"]) <= 60
    assert "llamagen-hf[demo]" in (SPACE / "requirements.txt").read_text()
