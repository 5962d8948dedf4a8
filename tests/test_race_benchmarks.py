"""The roofline counts the work of a step, and the race says what it needs."""

import importlib
from pathlib import Path

import pytest
import torch
from tiny import build_transformer


@pytest.fixture
def benchmark(monkeypatch):
    """A module of the benchmarks, by name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_work_of_a_step(benchmark, conditioning):
    roofline, model = benchmark("roofline"), build_transformer(conditioning=conditioning).bfloat16()
    config = model.config
    work = roofline.step_work(model, batch=3)
    read = [*model.model.layers.parameters(), model.lm_head.weight]
    matrices = sum(p.numel() for p in read if p.ndim == 2)
    assert work["matrices"] == roofline.Work(2 * matrices, 2 * 6 * matrices)
    length = 24 if conditioning == "class" else 32  # 1 or 12 positions and 16 codes, in eights
    numbers = config.num_hidden_layers * 6 * length * config.num_key_value_heads * config.head_dim
    assert work["attention"].bytes == 2 * 2 * numbers
    assert work["attention"].bound(bandwidth=1e9, rate=1e30) == pytest.approx(4e-9 * numbers)
    assert work["matrices"].bound(bandwidth=1e30, rate=1e9) == pytest.approx(12e-9 * matrices)


def test_operators_are_told_apart(benchmark):
    kind_of = benchmark("roofline").kind_of
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == kind_of("aten::bmm") == "attention"
    assert kind_of("aten::mm") == kind_of("graph_0_cpp_fused_mkldnn__linear_pointwise") == "matrices"
    assert kind_of("aten::searchsorted") == "sampling" and kind_of("aten::copy_") == "others"


@torch.no_grad()
def test_steps_are_timed_after_the_condition(benchmark):
    roofline = benchmark("roofline")
    decoder = benchmark("llamagen_hf.llamagen.decoding").CodeDecoder(build_transformer(conditioning="text"))
    ticks = iter([0.0, 100.0, *(101.0 + i for i in range(20))])
    assert roofline.step_seconds(decoder, 2, torch.device("cpu"), 10, lambda: next(ticks)) == 1
    found = roofline.kernels(decoder, 2, torch.device("cpu"), 3)
    calls = {name: count for name, _, count in found}
    assert calls["aten::mm"] >= 7 * decoder.model.config.num_hidden_layers


def test_what_the_race_needs(benchmark, tmp_path, capsys):
    race = benchmark("against_released")
    with pytest.raises(ValueError, match="is no checkout of FoundationVision/LlamaGen"):
        race.Released(tmp_path)
    for wrong in (["--batch", "0"], ["--num-codes", "2"], ["--clock", "cpu", "--device", "cuda"]):
        with pytest.raises(SystemExit):
            race.parse_args(["--released", str(tmp_path), *wrong])
    assert "one thread" in capsys.readouterr().err
    names = [variant.name for variant in race.VARIANTS]
    assert names[:3] == ["released, float32, eager", "ours, float32, eager", "released, float32, compiled"]
    assert len(set(names)) == 8
