"""Training of a classifier of noisy images: what it learns, logs and saves."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_diffusion_training import classifier_config
from tiny_training import write_shapes


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.arguments import FieldError  # noqa: E402
from llamagen_hf.data.samples import BadRow  # noqa: E402
from llamagen_hf.diffusion.guides import ClassifierGuide  # noqa: E402
from llamagen_hf.diffusion.training.classifier_samples import Labels  # noqa: E402
from llamagen_hf.diffusion.training.classifier_trainer import LEVELS, train_classifier  # noqa: E402
from llamagen_hf.training.record import read_facts  # noqa: E402


METRICS = ["test_loss", *(f"test_accuracy_{level}" for level in LEVELS)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Coloured shapes, a classifier of their captions, which are strings, and what its training returned."""
    folder = tmp_path_factory.mktemp("classifier")
    data = write_shapes(folder / "shapes")
    settings = {"class_column": "caption", "max_train_steps": 80, "batch_size": 10, "learning_rate": 1e-2}
    # Groups of several channels, since norms of single ones would take out the colours.
    settings |= {"block_out_channels": [8, 12], "attention_head_dim": 4, "crop": "center"}
    settings |= dict.fromkeys(("checkpointing_steps", "eval_steps", "sample_steps"), 100)
    config = classifier_config(folder / "out", **settings)
    return folder / "out", data, train_classifier(data, config)


def test_it_recognizes_classes_and_less_so_under_noise(trained):
    folder, _, metrics = trained
    assert list(metrics) == METRICS
    assert metrics["test_accuracy_0"] >= 0.75 and metrics["test_loss"] < 1.3863  # log 4; by chance 0.25
    assert metrics["test_accuracy_0"] >= metrics["test_accuracy_750"]
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"loss", "learning_rate"} <= logged[0].keys() and logged[-1]["test_loss"] == metrics["test_loss"]
    with Image.open(folder / "samples" / "step-00000080.png") as image:
        assert image.size == (8 * 20, len(LEVELS) * 20)


def test_what_is_saved_guides_and_says_how_it_was_trained(trained):
    folder, data, metrics = trained
    guide = ClassifierGuide.from_pretrained(folder, labels=["a red circle"])
    assert guide.classifier.config.labels == ["a black square", "a blue circle", "a green square", "a red circle"]
    noisy, timestep = torch.zeros(1, 3, 16, 16), torch.tensor(0)
    assert guide(noisy, timestep, noisy, 1.0).abs().sum() > 0
    facts = read_facts(folder)
    assert facts["classifier"]["metrics"] == metrics and facts["data"]["image_size"] == 16
    assert str(folder) not in json.dumps(facts)


def test_the_way_it_is_computed_does_not_matter(trained, tmp_path):
    """Two micro-batches and checkpointed activations are one batch."""
    _, data, _ = trained
    settings = {"class_column": "shape", "max_train_steps": 2, "mixed_precision": "no"}
    one = train_classifier(data, classifier_config(tmp_path / "one", **settings))
    settings |= {"micro_batch_size": 2, "gradient_checkpointing": True}
    other = train_classifier(data, classifier_config(tmp_path / "other", **settings))
    assert other == pytest.approx(one, rel=1e-3)


def test_labels_are_ids_or_names():
    features = datasets.Features(
        kind=datasets.ClassLabel(names=["b", "a"]), name=datasets.Value("string"), size=datasets.Value("int64")
    )
    values = {"kind": [0, -1, 1], "name": ["z", None, "y"], "size": [1, 2, 3]}
    rows = datasets.Dataset.from_dict(values, features=features)
    kind, name = Labels(rows, "kind"), Labels(rows, "name")
    assert kind.names == ["b", "a"] and name.names == ["y", "z"]
    assert [kind(rows[0]), kind(rows[2])] == [0, 1] and [name(rows[0]), name(rows[2])] == [1, 0]
    for labels in (kind, name):
        with pytest.raises(BadRow, match="no class: (-1|None) is none of the training's classes"):
            labels(rows[1])
    with pytest.raises(BadRow, match="no class: 'x'"):
        name({"name": "x"})
    for column, message in {
        "none": "The rows have no column 'none'; they have kind, name, size",
        "size": "The column 'size' holds .*; expected names, or ids with names",
    }.items():
        with pytest.raises(ValueError, match=message):
            Labels(rows, column)
    with pytest.raises(ValueError, match="'name' has 1 classes; expected at least 2"):
        Labels(rows.select([0]), "name")
    with pytest.raises(ValueError, match="of a stream does not say what classes there are"):
        Labels(rows.to_iterable_dataset(), "name")


def test_recipes_that_do_not_fit_are_one_sentence(trained, tmp_path):
    _, data, _ = trained
    with pytest.raises(ValueError, match="`image_size` is 15; .* expected a multiple of 2"):
        train_classifier(replace(data, image_size=15), classifier_config(tmp_path / "out"))
    with pytest.raises(FieldError, match="dropout is 1; expected a number of at least 0 and below 1"):
        classifier_config(tmp_path, dropout=1)
    assert not (tmp_path / "out").exists()
