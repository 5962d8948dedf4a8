"""The app around a cascade, and around bases of other kinds: small images first, then the larger ones."""

import json
import runpy
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from tiny import build_text_pipeline, generators
from tiny_cascade import build_cascade, build_nested_cascade
from tiny_diffusion import build_diffusion_pipeline


pytest.importorskip("gradio")

import psutil  # noqa: E402
from demo_client import arguments, running, shown_images  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402

from llamagen_hf import AutoregressiveImagePipeline, CascadePipeline  # noqa: E402
from llamagen_hf.demo import build_demo  # noqa: E402
from llamagen_hf.demo.app import lay_out  # noqa: E402
from llamagen_hf.demo.studio import Studio  # noqa: E402
from llamagen_hf.loading import checkpoint as checkpoint_module  # noqa: E402
from llamagen_hf.provenance import read_parameters  # noqa: E402


SPACE = Path(__file__).parents[2] / "spaces" / "llamagen"
FURTHER = (0.2, 3, 2.0)  # noise level, steps and guidance of the upsampler
OWN = ["seed", "count", "preview"]
LLAMAGEN = ["guidance_scale", "temperature", "top_k", "top_p"]
UPSAMPLER = ["aug_level", "upsampler_num_inference_steps"]
CANDIDATES = ["num_candidates"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def app():
    pipe = build_cascade()
    with running(pipe) as url:
        yield pipe, url


@pytest.fixture(scope="module")
def client(app):
    return Client(app[1], verbose=False)


def alone(pipe, seed, prompt="a red apple", **more):
    settings = {"aug_level": 0.2, "upsampler_num_inference_steps": 3, "upsampler_guidance_scale": 2.0}
    return pipe(prompt, guidance_scale=2.0, top_k=0, generator=generators(seed), **settings, **more)


def test_the_small_image_is_drawn_then_the_larger_one(app, client):
    job = client.submit(*arguments(), *FURTHER, api_name="/draw")
    *frames, last = list(job)
    assert [frame[1] for frame in frames] == ["21%", "42%", "63%", "84%", "89%", "95%"]  # of 16 codes and 3 steps
    expected = alone(app[0], 3)
    images = [shown_images(frame[0])[0] for frame in [*frames, last]]
    small = expected.base.images[0].resize((16, 16), Image.Resampling.BICUBIC)
    assert [image.size for image in images] == [(16, 16)] * 7 and len({image.tobytes() for image in images}) == 7
    assert images[3].tobytes() == small.tobytes() and images[-1].tobytes() == expected.images[0].tobytes()


def test_parameters_are_the_cascades_and_redraw_the_image(app, client):
    gallery, _, parameters, share = client.predict(*arguments(count=2), *FURTHER, api_name="/draw")
    entries = gallery["value"] if isinstance(gallery, dict) else gallery
    facts = [read_parameters(entry["image"]) for entry in entries]
    assert facts == json.loads(parameters) and facts[1]["upsampler"]["aug_level"] == 0.2
    assert app[0].redraw(facts[1]).images[0].tobytes() == shown_images(gallery)[1].tobytes()
    common = read_parameters(share["value"] if isinstance(share, dict) else share)
    assert common["seeds"] == [3, 4] and common["upsampler"]["num_inference_steps"] == 3
    assert common["upsampler"]["seeds"] == [each["upsampler"]["seed"] for each in facts]


def test_a_completion_is_enlarged(app, client, tmp_path):
    image = build_text_pipeline()("a fish", generator=generators(9)).images[0]
    image.save(tmp_path / "own.png")
    gallery, _, parameters, _ = client.predict(
        handle_file(str(tmp_path / "own.png")), 2, *arguments(), *FURTHER, api_name="/complete"
    )
    assert shown_images(gallery)[0].tobytes() == alone(app[0], 3, image=image, keep_rows=2).images[0].tobytes()
    assert len(json.loads(parameters)["prefix_codes"]) == 8
    kept, status = Studio(app[0]).keep(str(tmp_path / "own.png"), 2)
    assert status == "This part is kept." and kept["value"][0][0].crop((0, 8, 16, 16)).getcolors(1)


def test_the_best_of_several_small_images_is_enlarged(app, client):
    *frames, (gallery, *_) = list(client.submit(*arguments(count=2), *FURTHER, num_candidates=3, api_name="/draw"))
    assert len(frames) > 4 and all(len(shown_images(frame[0])) == 2 for frame in frames)
    expected = [alone(app[0], seed, num_candidates=3).images[0].tobytes() for seed in (3, 4)]
    assert [image.tobytes() for image in shown_images(gallery)] == expected


def test_clients_need_not_know_of_the_upsampler(app, client):
    facts = json.loads(client.predict(*arguments(), api_name="/draw")[2])
    defaults = app[0].upsampler.sampling_settings()
    assert facts["upsampler"] | defaults == facts["upsampler"]
    names = [
        one["parameter_name"]
        for one in client.view_api(return_format="dict")["named_endpoints"]["/draw"]["parameters"]
    ]
    assert names == ["condition", *LLAMAGEN, *OWN, *UPSAMPLER, "upsampler_guidance_scale", *CANDIDATES]


@pytest.mark.parametrize(
    "build, names, tabs",
    [
        (
            lambda: build_cascade("class", text=False),
            [*LLAMAGEN, *OWN, *UPSAMPLER, *CANDIDATES],
            ["Class", "Complete"],
        ),
        slow(build_nested_cascade, [*LLAMAGEN, *OWN, *UPSAMPLER, *CANDIDATES], ["Text", "Complete"]),
        slow(build_diffusion_pipeline, ["guidance_scale", "num_inference_steps", *OWN], ["Text"]),
        (
            lambda: build_cascade("diffusion", text=False),
            ["guidance_scale", "num_inference_steps", *OWN, *UPSAMPLER],
            ["Text"],
        ),
        slow(lambda: build_cascade("dit", text=False), [*OWN, *UPSAMPLER], ["Class"]),
    ],
)
def test_the_app_shows_what_the_pipeline_has(build, names, tabs):
    pipe = build()
    studio, demo = Studio(pipe), lay_out(pipe, [1], "tiny")
    assert studio.names == names
    labels = [part["props"].get("label") for part in demo.get_config_file()["components"] if part["type"] == "tabitem"]
    assert labels == tabs
    if pipe.condition_kind == "class":
        (choices,) = [block.choices for block in demo.blocks.values() if block.get_block_name() == "dropdown"][:1]
        assert len(choices) == pipe.num_classes and choices[1] == (f"{pipe.class_names(1)[0]} (1)", 1)


@pytest.mark.parametrize("kind", ["diffusion", pytest.param("dit", marks=pytest.mark.slow)])
def test_bases_of_other_kinds_draw(kind):
    pipe = build_cascade(kind, text=False)
    studio, condition = Studio(pipe), 4 if kind == "dit" else "a red apple"
    base = [2.0, 2] if kind == "diffusion" else []  # a foreign base has its own defaults
    *frames, last = studio.draw(condition, *base, "3", 1, "every step", 0.2, 3)
    first, final = (frame[0]["value"][0][0] for frame in (frames[0], frames[-1]))
    assert first.size == final.size == (16, 16) and first.tobytes() != final.tobytes()
    assert json.loads(last[2])["upsampler"]["num_inference_steps"] == 3


def test_previews_that_nobody_sees_are_not_made(monkeypatch):
    pipe, made = build_cascade(), []
    enlarged = CascadePipeline._enlarged
    monkeypatch.setattr(CascadePipeline, "_enlarged", lambda *args: made.append(1) or enlarged(*args))
    frames = list(Studio(pipe).draw(*arguments(preview="off"), *FURTHER, 1))
    assert len(frames) == 7 and made == []
    list(Studio(pipe).draw(*arguments(), *FURTHER, 1))
    assert len(made) == 4


def test_stopping_stops_the_upsampler_too(monkeypatch):
    pipe, steps = build_cascade(), []
    forward = pipe.upsampler.unet.forward
    monkeypatch.setattr(pipe.upsampler.unet, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    frames = Studio(pipe).draw(*arguments(preview="off"), 0.2, 9, 1.0, 1)
    while len(steps) < 2:
        next(frames)
    frames.close()
    assert len(steps) == 2
    list(Studio(pipe).draw(*arguments(), *FURTHER, 1))  # and the next one goes through


def test_the_space_takes_both_from_its_variables_and_shows_no_path(tmp_path, monkeypatch):
    build_text_pipeline().save_pretrained(tmp_path / "base")
    build_diffusion_pipeline(text=False, upsamples=True).save_pretrained(tmp_path / "large")
    monkeypatch.setenv("LLAMAGEN_CHECKPOINT", str(tmp_path / "base"))
    monkeypatch.setenv("LLAMAGEN_UPSAMPLER", str(tmp_path / "large"))
    monkeypatch.setenv("LLAMAGEN_DTYPE", "")  # a variable without a value
    demo = runpy.run_path(str(SPACE / "app.py"))["demo"]
    (event,) = [block.fn for block in demo.fns.values() if block.api_name == "draw"][:1]
    *_, (_, _, parameters, _) = event(*arguments(), 0.0, 2, 1)
    facts = json.loads(parameters)
    assert (facts["checkpoint"], facts["upsampler"]["checkpoint"]) == ("base", "large")
    assert str(tmp_path) not in json.dumps(demo.get_config_file(), default=str)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: build_diffusion_pipeline(upsamples=True), "enlarges images: pass it as the upsampler"),
        (lambda: build_diffusion_pipeline(text=False), "draws from noise alone"),
    ],
)
def test_what_visitors_can_not_ask_for_is_refused(tmp_path, build, message):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_demo(str(tmp_path), "cpu")


@pytest.mark.parametrize("option", [{"quantization": "int8"}, {"compile": True}])
def test_a_model_of_pixels_is_neither_quantized_nor_compiled(tmp_path, option):
    build_diffusion_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Only models that generate codes are quantized or compiled here."):
        build_demo(str(tmp_path), "cpu", **option)


def test_the_generator_is_compiled_on_request(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(AutoregressiveImagePipeline, "compile_step", lambda pipe: compiled.append(pipe))
    build_text_pipeline().save_pretrained(tmp_path)
    build_demo(str(tmp_path), "cpu", compile=True)
    assert len(compiled) == 1


def test_the_shipped_upsampler_comes_with_the_shipped_checkpoint(tmp_path, monkeypatch):
    build_text_pipeline().save_pretrained(tmp_path / "emoji")
    monkeypatch.setattr(checkpoint_module, "SHIPPED", tmp_path)
    build_diffusion_pipeline(text=False, upsamples=True).save_pretrained(tmp_path / "emoji_upsampler")
    for upsampler, is_large in ((None, True), ("none", False)):
        blocks = build_demo(device="cpu", upsampler=upsampler).blocks.values()
        assert any(getattr(block, "label", None) == "Noise level" for block in blocks) is is_large


@pytest.mark.slow
def test_many_clients_get_their_own_images_and_memory_returns(app):
    pipe, url = app
    expected = {seed: alone(pipe, seed, f"image {seed}").images[0].tobytes() for seed in range(8)}
    clients = [Client(url, verbose=False) for _ in range(8)]

    def ask(seed):
        result = clients[seed].predict(*arguments(f"image {seed}", str(seed)), *FURTHER, api_name="/draw")
        return seed, shown_images(result[0])[0].tobytes()

    def everyone():
        with ThreadPoolExecutor(8) as pool:
            return dict(pool.map(ask, range(8)))

    assert everyone() == expected and len(set(expected.values())) == 8
    everyone()
    before = psutil.Process().memory_info().rss
    everyone()
    assert psutil.Process().memory_info().rss - before < 40e6


@pytest.mark.slow
def test_cancelling_stops_the_upsampler(monkeypatch):
    pipe, steps = build_cascade(), []
    forward = pipe.upsampler.unet.forward

    def slow(*args, **kwargs):
        steps.append(1)
        time.sleep(0.1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.upsampler.unet, "forward", slow)
    with running(pipe) as url:
        job = Client(url, verbose=False).submit(*arguments(), 0.2, 50, 1.0, api_name="/draw")
        while not steps:
            time.sleep(0.05)
        job.cancel()
        time.sleep(1)
        done = len(steps)
        time.sleep(0.5)
        assert len(steps) == done < 50
