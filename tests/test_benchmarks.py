"""Benchmarks measure the same work on both sides."""

import importlib
from pathlib import Path

import pytest


pytest.importorskip("datasets", reason="the training extra is not installed")


@pytest.mark.parametrize(
    "size, ema_decay", [("tiny", 0.0), ("tiny", 0.9), ("tiny diffusion", 0.9), ("tiny upsampler", 0.0)]
)
def test_trainer_and_straight_loop_take_the_same_steps(size, ema_decay, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    train = importlib.import_module("train")
    args = "--batch_size 2 --steps 4 --repeats 2 --dropout 0 --modes loop trainer plain"
    loop, trainer, plain = train.measure(size, ema_decay, train.parse_args(args.split()))
    assert (loop["mode"], trainer["mode"], plain["mode"]) == ("loop", "trainer", "plain")
    assert len(loop["losses"]) == 4
    # The head starts at zero, so the first losses agree for any batch; the later ones depend on batch and update.
    assert trainer["losses"] == pytest.approx(loop["losses"], rel=1e-5)
    assert plain["losses"] == pytest.approx(loop["losses"], rel=1e-5)
    assert loop["apart"] == 0 < plain["apart"] + trainer["apart"] and max(plain["apart"], trainer["apart"]) < 1e-2
    assert len({round(loss, 5) for loss in loop["losses"]}) == 4
    positions = 16 if size == "tiny" else 256
    for record in (loop, trainer):
        assert record["size"] == size and record["averaged_weights"] == bool(ema_decay)
        assert record["tokens_per_second"] == pytest.approx(positions * record["images_per_second"])
        assert record["ratio"] > 0 and {"mfu", "peak_gib"} < record.keys()
    assert loop["ratio"] == 1
