"""The scoreboard of the emoji checkpoint, and the network that it measures with."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import build_text_pipeline


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_emoji import build_network, read_rows  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from llamagen_hf.data.source import DataConfig  # noqa: E402


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DATASET = Path(__file__).parents[2] / "shared" / "data" / "emoji"


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the benchmarks, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in ("emoji_classifier", "scoreboard", "train_scoreboard")}


@pytest.fixture(scope="module")
def rows():
    return read_rows()


@pytest.fixture(scope="module")
def network(benchmarks):
    folder = benchmarks["emoji_classifier"].CLASSIFIER
    model = benchmarks["emoji_classifier"].EmojiClassifier.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def tiny_network(benchmarks, rows):
    return build_network(benchmarks, rows)


def test_the_network_is_small_half_precision_and_documented(benchmarks):
    folder = benchmarks["emoji_classifier"].CLASSIFIER
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) < 4e6
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys() if "num_batches_tracked" not in name}
    assert kinds == {"F16"}
    text = (folder / "README.md").read_text(encoding="utf-8")
    for owner in ("Microsoft Corporation", "Google Inc", "Twitter, Inc", "Unicode, Inc"):
        assert owner in text
    for values in json.loads((folder / "metrics.json").read_text(encoding="utf-8")).values():
        assert all(f"{value:.1%}" in text for value in values.values())


def test_the_network_knows_emoji_and_their_captions(benchmarks, rows, network):
    model, tokenizer = network
    judge = benchmarks["scoreboard"].Judge(model, tokenizer, {})
    features = judge.look_at(rows)
    assert features.shape == (40, model.config.hidden_sizes[-1]) and features.min() >= 0
    known = benchmarks["emoji_classifier"].accuracies(model, features, rows)
    assert known["style"] > 0.5 and known["group"] > 0.5  # of five styles and nine groups
    captions = list(rows["caption"])
    assert benchmarks["emoji_classifier"].caption_precision(model, tokenizer, features, captions) > 0.1
    shuffled = captions[1:] + captions[:1]
    assert benchmarks["emoji_classifier"].caption_precision(model, tokenizer, features, shuffled) < 0.1


def test_real_images_are_perfect_against_themselves_and_the_worse_the_noisier(benchmarks, rows, network):
    judge = benchmarks["scoreboard"].Judge(*network, {"test": rows})
    images = np.stack([np.array(image.resize((64, 64))) for image in rows["image"]])
    noise = np.random.default_rng(0).integers(0, 256, images.shape)
    noisy = (images * 0.8 + noise * 0.2).astype(np.uint8)
    same, worse, worst = (judge.score(source, rows) for source in (rows, noisy, noise.astype(np.uint8)))
    assert same["distance_to_test"] == pytest.approx(0, abs=1e-6)
    assert same["precision_test"] == same["recall_test"] == 1
    assert 0 < worse["distance_to_test"] < worst["distance_to_test"]
    assert 1 > worse["recall_test"] > worst["recall_test"] == 0  # all noise is one place, which may be near an image
    assert same["group_accuracy"] > worst["group_accuracy"] and same["r_precision"] > worst["r_precision"]


def test_features_do_not_depend_on_the_batch(benchmarks, rows, network, monkeypatch):
    judge = benchmarks["scoreboard"].Judge(*network, {})
    together = judge.look_at(rows)
    monkeypatch.setattr(benchmarks["emoji_classifier"], "BATCH_SIZE", 7)
    torch.testing.assert_close(judge.look_at(rows), together, rtol=1e-4, atol=1e-5)


def test_caption_precision_is_chance_for_images_that_say_nothing(benchmarks, network):
    model, tokenizer = network
    captions = [f"thing {i}" for i in range(200)]
    features = torch.rand(200, model.config.hidden_sizes[-1])
    of_two = benchmarks["emoji_classifier"].caption_precision(model, tokenizer, features, captions, num_candidates=2)
    assert 0.35 < of_two < 0.65
    assert benchmarks["emoji_classifier"].caption_precision(model, tokenizer, features, captions) < 0.1


def test_the_scoreboard_measures_a_pipeline_the_same_way_twice(benchmarks, rows, tiny_network):
    scoreboard = benchmarks["scoreboard"]
    splits = {"test": rows.select(range(8)), "train": rows.select(range(8, 40))}
    judge = scoreboard.Judge(*tiny_network, splits)
    pipe = build_text_pipeline()
    results = scoreboard.measure(pipe, judge, splits, 8)
    assert list(results["sets"]) == [
        name for split in ("test", "train")
        for name in (f"{split} images", f"{split} images, reconstructed", f"drawn for {split} captions")
    ]  # fmt: skip
    real = results["sets"]["test images"]
    assert real["images"] == 8 and real["precision_test"] == 1
    assert real["distance_to_test"] < results["sets"]["drawn for test captions"]["distance_to_test"]
    assert results["test"]["loss"] > 0 and results["test"]["loss"] != results["test"]["loss_without_prompt"]
    assert results["test"]["psnr"] > 0 and 0 < results["test"]["codebook_usage"] <= 1
    assert scoreboard.measure(pipe, judge, splits, 8) == results
    table = scoreboard.show(results)
    assert "FID" not in table and len(table.splitlines()) == 8 + 1 + 8
    assert {line.count("|") for line in table.splitlines()[:8]} == {12}


def test_rows_are_taken_at_even_distances(benchmarks, rows):
    chosen = benchmarks["scoreboard"].evenly(rows, 4)
    assert list(chosen["caption"]) == [rows[i]["caption"] for i in (0, 10, 20, 30)]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--dataset", "./nothing"], "can't be read: there is no such folder"),
        (["--count", "3"], "--count is 3; expected 4 to 8"),
    ],
)
def test_what_does_not_fit_is_one_sentence(benchmarks, rows, args, message, tmp_path, monkeypatch, capsys):
    for split, part in (("test", rows.select(range(8))), ("train", rows.select(range(8, 40)))):
        part.to_parquet(tmp_path / f"{split}-00000.parquet")
    monkeypatch.setattr(sys, "argv", ["scoreboard.py", "--dataset", str(tmp_path), *args])
    with pytest.raises(SystemExit):
        benchmarks["scoreboard"].main()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_emoji_is_held_out_in_all_tones_and_genders(benchmarks):
    is_held_out = benchmarks["train_scoreboard"].is_held_out
    cooks = ["1F9D1-200D-1F373", "1F468-200D-1F373", "1F469-1F3FD-200D-1F373"]
    runners = ["1F3C3", "1F3C3-1F3FB", "1F3C3-200D-2640-FE0F", "1F3C3-200D-27A1-FE0F"]
    for family in (cooks, runners):
        assert len({is_held_out(code) for code in family}) == 1
    share = np.mean([is_held_out(f"{code:X}") for code in range(0x1F300, 0x1F700)])
    assert 0.03 < share < 0.07


def test_changed_images_keep_their_white_ground_and_mirror_only_where_allowed(benchmarks, rows):
    change = benchmarks["train_scoreboard"].change_images
    white = torch.ones(16, 3, 32, 32)
    assert change(white, torch.ones(16, dtype=torch.bool)).equal(white)
    left = torch.ones(64, 3, 32, 32)
    left[:, :, 8:24, 4:12] = -1  # a bar on the left
    for may_flip, sides in ((False, {True}), (True, {True, False})):
        changed = 1 - change(left, torch.full((64,), may_flip))
        assert set((changed[..., :16].sum((1, 2, 3)) > changed[..., 16:].sum((1, 2, 3))).tolist()) == sides


def test_training_writes_a_network_that_loads(benchmarks, rows, tmp_path):
    train = datasets.concatenate_datasets([rows] * 4)
    train.to_parquet(tmp_path / "train-00000.parquet")
    rows.to_parquet(tmp_path / "test-00000.parquet")
    output = tmp_path / "network"
    sizes = ["--hidden_sizes", "8", "16", "--depths", "1", "1", "--epochs", "1"]
    benchmarks["train_scoreboard"].main(["--dataset", str(tmp_path), "--output", str(output), *sizes])
    model = benchmarks["emoji_classifier"].EmojiClassifier.from_pretrained(output, dtype=torch.float32).eval()
    measured = benchmarks["train_scoreboard"].evaluate(
        model, AutoTokenizer.from_pretrained(output / "tokenizer"), rows
    )
    assert measured == pytest.approx(json.loads((output / "metrics.json").read_text())["test"], abs=0.03)


@pytest.mark.slow
@pytest.mark.skipif(not DATASET.is_dir(), reason="the emoji are not there")
def test_the_network_does_what_its_card_says(benchmarks, network):
    folder = benchmarks["emoji_classifier"].CLASSIFIER
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test"]
    measured = benchmarks["train_scoreboard"].evaluate(*network, DataConfig(str(DATASET)).load("test"))
    assert measured == pytest.approx(metrics, abs=0.005)
