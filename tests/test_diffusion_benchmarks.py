"""The benchmarks of thresholding and of upsamplers: what they measure, and on what."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny import build_text_pipeline
from tiny_diffusion import build_diffusion_pipeline


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_emoji import build_network, read_rows  # noqa: E402

from llamagen_hf.diffusion.training.small_images import SmallImages  # noqa: E402
from llamagen_hf.evaluation.reconstruction import PerceptualLoss  # noqa: E402


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("emoji_classifier", "scoreboard", "train_scoreboard", "thresholding", "upsampling")


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the benchmarks, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in NAMES}


@pytest.fixture(scope="module")
def rows():
    return read_rows().select(range(8))


@pytest.fixture(scope="module")
def judge(benchmarks, rows):
    return benchmarks["scoreboard"].Judge(*build_network(benchmarks, rows), {"test": rows})


@pytest.fixture
def dataset(rows, tmp_path):
    """A folder with the rows as its test split."""
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    return str(tmp_path / "data")


@pytest.fixture
def base(tmp_path):
    build_text_pipeline().save_pretrained(tmp_path / "base")  # of 8 x 8 pixels
    return str(tmp_path / "base")


def test_saturation_of_known_images(benchmarks):
    saturation = benchmarks["thresholding"].saturation
    grey, red, dark_red = ([128, 128, 128], [255, 0, 0], [100, 50, 50])
    for color, at_limits, expected in ((grey, 0, 0), (red, 1, 1), (dark_red, 0, 0.5), ([0, 0, 0], 1, 0)):
        measured = saturation(np.full((2, 4, 4, 3), color, dtype=np.uint8))
        assert measured == {"at_limits": at_limits, "saturation": expected}
    half = np.array([grey, red], dtype=np.uint8).reshape(1, 1, 2, 3)
    assert saturation(half) == {"at_limits": 0.5, "saturation": 0.5}


def test_each_guidance_is_measured_with_each_thresholding(benchmarks, rows, judge):
    pipe = build_diffusion_pipeline()
    trained = dict(pipe.scheduler.config)
    results = benchmarks["thresholding"].measure(pipe, rows, [1.0, 15.0], judge, num_inference_steps=3)
    assert dict(pipe.scheduler.config) == trained
    real, drawn = results[0], {(row["guidance_scale"], row["thresholding"]): row for row in results[1:]}
    assert real["distance_to_test"] == pytest.approx(0, abs=1e-6) and real["precision_test"] == 1
    assert list(drawn) == [(scale, kind) for scale in (1.0, 15.0) for kind in ("none", "static", "dynamic")]
    strong = [drawn[15.0, kind] for kind in ("none", "static", "dynamic")]
    assert len({row["at_limits"] for row in strong}) == len({row["distance_to_test"] for row in strong}) == 3
    # Dynamic thresholding divides what static thresholding leaves at the limits.
    assert strong[2]["at_limits"] < strong[1]["at_limits"]
    lines = benchmarks["thresholding"].show(results).splitlines()
    assert len(lines) == 2 + 7 and {line.count("|") for line in lines} == {7}


def test_without_emoji_there_is_no_distance_and_a_sentence(benchmarks, rows, tmp_path, capsys):
    build_diffusion_pipeline().save_pretrained(tmp_path / "pipe")
    for split in ("train", "test"):
        rows.select_columns(["image", "caption"]).to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    arguments = ["--checkpoint", str(tmp_path / "pipe"), "--dataset", str(tmp_path / "data"), "--count", "4"]
    benchmarks["thresholding"].main([*arguments, "--guidance", "3", "--steps", "2"])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "The dataset has no group, style, subgroup, so there is no distance of emoji to measure."
    results = json.loads(last)
    assert len(results) == 4 and set(results[1]) == {"guidance_scale", "thresholding", "at_limits", "saturation"}
    table = benchmarks["thresholding"].show(results)
    assert "distance" not in table and "| 3 | dynamic |" in table and str(tmp_path) not in table


def test_windows_are_squares_side_by_side(benchmarks):
    images = np.arange(2 * 5 * 4 * 3, dtype=np.uint8).reshape(2, 5, 4, 3)  # the last row of pixels is left over
    windows = benchmarks["upsampling"].windows(images, 2)
    assert windows.shape == (8, 2, 2, 3)
    for index, (image, top, left) in enumerate((i, y, x) for i in (0, 1) for y in (0, 2) for x in (0, 2)):
        assert np.array_equal(windows[index], images[image, top : top + 2, left : left + 2])


def test_windows_show_what_whole_images_hide(benchmarks):
    """Of bicubic enlargement hardly anything is left once images are reduced to the size that the network sees."""
    upsampling, rows = benchmarks["upsampling"], read_rows()
    judge = benchmarks["scoreboard"].load_judge({})
    large = upsampling.to_tensor(rows, 128)
    enlarged = upsampling.enlarge(SmallImages(64, 128).reduce(large), 128)
    whole, windows = (
        [judge.look_at(view(upsampling.to_array(images))) for images in (large, enlarged)]
        for view in (lambda images: images, lambda images: upsampling.windows(images, 64))
    )
    assert upsampling.frechet_distance(*windows) > 2 * upsampling.frechet_distance(*whole) > 0


def test_an_upsampler_is_measured_beside_bicubic_enlargement(benchmarks, rows, judge, base):
    upsampling, own = benchmarks["upsampling"], build_text_pipeline()
    upsampler = build_diffusion_pipeline(upsamples=True)
    arguments = (own, upsampler, SmallImages(8, 16, base), judge, rows, [2])
    results = upsampling.measure(*arguments, PerceptualLoss(), repeats=1)
    assert results["steps"] == 4 and not results["ships"]  # it has learned nothing
    assert list(results["sets"]) == ["reduced", "redrawn", "drawn"]
    for name, calls in results["sets"].items():
        assert list(calls) == ["bicubic", "2 steps", "4 steps"]
        paired = set() if name == "drawn" else {"psnr", "ssim", "lpips"}
        for scores in calls.values():
            assert paired <= set(scores) and ("psnr" in scores) == bool(paired)
            assert all(math.isfinite(value) for value in scores.values())
        assert 0 < calls["bicubic"]["seconds"] < calls["4 steps"]["seconds"]
        assert calls["2 steps"]["window_distance"] != calls["4 steps"]["window_distance"]
    reduced = results["sets"]["reduced"]
    assert reduced["bicubic"]["psnr"] > reduced["4 steps"]["psnr"]
    again = upsampling.measure(*arguments, repeats=1)["sets"]
    assert [again[name][call]["distance"] for name in again for call in again[name]] == [
        results["sets"][name][call]["distance"] for name in again for call in again[name]
    ]
    lines = upsampling.show(results).splitlines()
    assert len(lines) == 2 + 9 + 2 and {line.count("|") for line in lines[:11]} == {9}


def test_an_image_is_enlarged_from_its_own_seed(benchmarks, monkeypatch):
    upsampling, upsampler = benchmarks["upsampling"], build_diffusion_pipeline(text=False, upsamples=True)
    small = 2 * torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    together = upsampling.upsample(upsampler, small, [""] * 5)
    monkeypatch.setattr(upsampling, "BATCH_SIZE", 2)
    torch.testing.assert_close(upsampling.upsample(upsampler, small, [""] * 5), together)


def test_only_what_beats_bicubic_enlargement_everywhere_ships(benchmarks):
    better, worse = {"window_distance": 1.0, "lpips": 0.1}, {"window_distance": 3.0, "lpips": 0.3}
    bicubic = {"window_distance": 2.0, "lpips": 0.2}
    without = {"window_distance": 2.0}
    ships = benchmarks["upsampling"].ships

    def decide(reduced: dict, drawn: dict) -> bool:
        sets = {"reduced": {"bicubic": bicubic, "8 steps": reduced}, "drawn": {"bicubic": without, "8 steps": drawn}}
        return ships(sets, "8 steps")

    assert decide(better, better)
    assert not decide(worse, better) and not decide(better, worse)
    assert not decide(better | {"lpips": 0.2}, better)


def test_the_benchmark_of_upsamplers_runs(benchmarks, dataset, base, tmp_path, capsys, monkeypatch):
    build_diffusion_pipeline(text=False, upsamples=True).save_pretrained(tmp_path / "upsampler")
    upsampling = benchmarks["upsampling"]

    def unreachable():
        raise OSError("There is no VGG16.")

    monkeypatch.setattr(upsampling.PerceptualLoss, "from_pretrained", unreachable)
    arguments = ["--base", base, "--dataset", dataset, "--upsampler", str(tmp_path / "upsampler")]
    upsampling.main([*arguments, "--count", "4", "--steps", "1", "--aug_level", "0.2"])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "There is no VGG16. LPIPS is left out."
    results = json.loads(last)
    assert set(results["sets"]["reduced"]) == {"bicubic", "1 steps", "4 steps"}
    assert "LPIPS" not in upsampling.show(results) and "PSNR" in upsampling.show(results)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("thresholding", ["--checkpoint", "UPSAMPLER"], "is no base that reads text"),
        ("thresholding", ["--checkpoint", "EULER"], "EulerDiscreteScheduler has no thresholding"),
        ("thresholding", ["--checkpoint", "TEXT", "--dataset", "./nothing"], "can't be read: there is no such folder"),
        ("thresholding", ["--checkpoint", "TEXT", "--count", "9"], "--count is 9; expected 4 to 8"),
        ("upsampling", ["--upsampler", "TEXT"], "expected an upsampler"),
        ("upsampling", ["--upsampler", "UPSAMPLER", "--base", "TEXT"], "the base draws 16 pixels"),
        ("upsampling", ["--upsampler", "UPSAMPLER", "--base", "UPSAMPLER"], "takes no prompts"),
        ("upsampling", ["--upsampler", "UPSAMPLER", "--count", "3"], "--count is 3; expected 4 to 8"),
    ],
)
def test_what_does_not_fit_is_one_sentence(benchmarks, dataset, base, tmp_path, name, arguments, message, capsys):
    folders = {name: tmp_path / name for name in ("UPSAMPLER", "TEXT", "EULER")}
    build_diffusion_pipeline(text=False, upsamples=True).save_pretrained(folders["UPSAMPLER"])
    text = build_diffusion_pipeline()
    text.save_pretrained(folders["TEXT"])
    text.scheduler = EulerDiscreteScheduler.from_config(text.scheduler.config)
    text.save_pretrained(folders["EULER"])
    arguments = [str(folders.get(argument, argument)) for argument in arguments]
    if "--dataset" not in arguments:
        arguments += ["--dataset", dataset]
    if name == "upsampling" and "--base" not in arguments:
        arguments += ["--base", base]
    with pytest.raises(SystemExit):
        benchmarks[name].main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
