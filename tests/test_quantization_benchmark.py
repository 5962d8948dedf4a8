"""The benchmark of quantization: what it measures, and which modes it marks."""

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import build_text_pipeline
from tiny_diffusion import build_diffusion_pipeline


pytest.importorskip("datasets", reason="the training extra is not installed")
pytest.importorskip("torchao", reason="the quantization extra is not installed")

from tiny_emoji import build_network, read_rows  # noqa: E402

from llamagen_hf.families import load_pipeline  # noqa: E402


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("emoji_classifier", "scoreboard", "train_scoreboard", "quantization")


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the benchmarks, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in NAMES}


@pytest.fixture(scope="module")
def rows():
    return read_rows().select(range(6))


@pytest.fixture(scope="module")
def judge(benchmarks, rows):
    return benchmarks["scoreboard"].Judge(*build_network(benchmarks, rows), {"test": rows})


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_generators_are_compared_with_float32(benchmarks, judge, rows, tmp_path):
    build_text_pipeline().save_pretrained(tmp_path)
    others = [f"other seeds {number}" for number in (1, 2, 3)]
    measure = benchmarks["quantization"].measure_generator
    results = measure(
        partial(load_pipeline, tmp_path),
        judge,
        rows,
        rows,
        ["float32", "int8", "float8", "quantize_dynamic", "bfloat16"],
        1,
    )
    assert list(results) == ["float32", "int8", "float8", "quantize_dynamic", "bfloat16", *others]
    reference, int8, float8, dynamic, _, other, *_ = results.values()
    assert reference["logit_error"] == 0 and reference["forced"] == reference["free"] == reference["ratio"] == 1
    assert reference["moved"] == 0 and other["moved"] != 0 and "megabytes" not in other
    assert 0 < int8["logit_error"] < float8["logit_error"] < 1
    assert float8["forced"] <= int8["forced"] <= 1 and dynamic["logit_error"] > 0
    assert int8["loss"] == pytest.approx(reference["loss"], rel=0.01) and int8["loss"] != reference["loss"]
    assert int8["megabytes"] < reference["megabytes"]
    assert int8["moved"] == pytest.approx(int8["distance"] / reference["distance"] - 1)


def test_unets_too(benchmarks, judge, rows, tmp_path):
    build_diffusion_pipeline(upsamples=True).save_pretrained(tmp_path)
    results = benchmarks["quantization"].measure_unet(
        partial(load_pipeline, tmp_path), judge, rows, ["float32", "int8"], 1
    )
    assert results["float32"]["image_error"] == 0 and 0 < results["int8"]["image_error"] < 0.1
    assert results["int8"]["megabytes"] < results["float32"]["megabytes"]
    assert json.dumps(results)


def test_modes_that_move_the_distance_are_marked(benchmarks):
    results = {"float32": {"distance": 50.0}, "good": {"distance": 50.9}, "bad": {"distance": 48.9}}
    shown = benchmarks["quantization"].show(benchmarks["quantization"].with_moves(results)).splitlines()
    assert shown[0] == "| weights | distance | moved |"
    assert shown[2:] == [
        "| float32 | 50.00 | +0.0% |",
        "| good | 50.90 | +1.8% |",
        "| bad | 48.90 | -2.2% **over 2 %** |",
    ]


def test_the_same_noise_draws_the_same_codes(benchmarks):
    settings = {"temperature": 1.0, "top_k": 2, "top_p": 1.0}
    logits = torch.randn(2, 500, 8)
    drawn = benchmarks["quantization"].draw_forced(logits, settings)
    assert torch.equal(drawn, benchmarks["quantization"].draw_forced(logits + 1e-7, settings))
    assert all(
        (logits[drawn == code][:, code] >= logits[drawn == code].topk(2).values[:, 1]).all() for code in range(8)
    )
    two = torch.tensor([0.0, 1.0]).expand(1, 4000, 2)
    share = benchmarks["quantization"].draw_forced(two, settings).float().mean()
    assert share == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.03)


@pytest.mark.parametrize(
    "arguments, message",
    [(["--unet", "emoji_upsampler", "--compile"], "--compile is for generators"), (["--dataset", "absent"], "absent")],
)
def test_wrong_arguments_are_refused(benchmarks, capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmarks["quantization"].main(arguments)
    assert message in capsys.readouterr().err
