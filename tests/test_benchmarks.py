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


def test_windows_are_compared_by_their_codes(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    windows = importlib.import_module("windows")
    monkeypatch.setattr("sys.argv", "windows.py --windows 1 4 --batches 1 2 --images 2".split())
    windows.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("of 2")]
    assert [row[:2] for row in rows] == [["1", "1"], ["1", "4"], ["2", "1"], ["2", "4"]]
    assert all(row[-3] == "0" for row in rows)
    assert float(rows[0][2]) == 63 and float(rows[1][2]) < 60
