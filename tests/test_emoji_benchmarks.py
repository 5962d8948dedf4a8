"""The benchmarks of what a prior and a finer grid bring, with tiny models."""

import importlib
from pathlib import Path

import pytest
import torch
from tiny import build_clip, build_text_pipeline, build_vq_model


pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_emoji import build_network, read_rows  # noqa: E402
from tiny_unclip import build_decoder, build_prior_pipeline  # noqa: E402


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the benchmarks, by name."""
    names = ("emoji_classifier", "scoreboard", "train_scoreboard", "unclip", "grids")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def judge(benchmarks):
    rows = read_rows()
    splits = {"test": rows.select(range(8)), "train": rows}
    return benchmarks["scoreboard"].Judge(*build_network(benchmarks, rows), splits)


def test_each_way_from_a_caption_to_an_image_is_measured(benchmarks, judge):
    unclip, rows = benchmarks["unclip"], read_rows().select(range(12))
    priors = {f"{kind} prior": build_prior_pipeline(kind) for kind in ("diffusion", "autoregressive")}
    decoder = build_decoder("autoregressive")
    decoder.set_progress_bar_config(disable=True)
    arguments = rows, judge, build_clip(), decoder, priors, build_text_pipeline()
    results = unclip.measure(*arguments)
    assert list(results) == ["words", "text embedding", "diffusion prior", "autoregressive prior", "image embedding"]
    own = results["image embedding"]
    assert own["cosine"] == pytest.approx(1) and own["found"] == 1
    assert all(results[name]["cosine"] < 0.999 for name in ("text embedding", *priors))
    assert "cosine" not in results["words"] and all("r_precision" in scores for scores in results.values())
    assert len({scores["distance_to_train"] for scores in results.values()}) == 5
    assert unclip.measure(*arguments) == results
    table = unclip.show(results).splitlines()
    assert len(table) == 7 and {line.count("|") for line in table} == {9}


def test_finer_grids_are_compared_at_the_smallest_size(benchmarks, judge):
    grids, rows = benchmarks["grids"], read_rows().select(range(8))
    vq_model = build_vq_model()
    small, large = (grids.measure(vq_model, judge, rows, size, 8) for size in (8, 16))
    assert small["psnr"] == small["psnr_reduced"] and large["psnr"] != large["psnr_reduced"]
    with torch.no_grad():
        originals = benchmarks["scoreboard"].to_tensor(rows, 8)
        errors = (vq_model(originals).sample.clamp(-1, 1) - originals) / 2
    expected = -10 * errors.square().mean((1, 2, 3)).log10().mean().item()
    assert small["psnr"] == pytest.approx(expected, rel=1e-4)
