"""Captions of rows: templates, their weights, names of classes, and rows of which nothing can be said."""

import random

import pytest


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.data.captions import Captions, write_caption  # noqa: E402
from llamagen_hf.data.samples import BadRow  # noqa: E402


def test_captions_follow_the_templates():
    row, rng = (
        {"caption": "a red circle", "tags": ["red", "circle"], "none": [], "json": {"alt": "red"}},
        random.Random(0),
    )
    assert write_caption(row, {"{caption}": 1.0}, rng) == "a red circle"
    drawn = {write_caption(row, {"{tags} icon": 1.0}, rng) for _ in range(200)}
    assert drawn == {"red icon", "circle icon", "red circle icon", "circle red icon"}
    assert write_caption(row, {"{none}": 1.0, "{caption}": 0.1}, rng) == "a red circle"
    assert write_caption(row, {"{json[alt]} thing": 1.0}, rng) == "red thing"
    with pytest.raises(ValueError, match="names 'title'; the columns are .'caption', 'json', 'none', 'tags'."):
        write_caption(row, {"{title}": 1.0}, rng)
    for empty in (None, "", "  ", []):
        with pytest.raises(BadRow, match="no caption"):
            write_caption({"caption": empty}, {"{caption}": 1.0}, rng)


def test_short_and_long_captions_are_mixed_by_their_weights():
    rows = {"short": "s", "long": "l"}
    rng = random.Random(0)
    drawn = [write_caption(rows, {"{short}": 0.3, "{long}": 0.7}, rng) for _ in range(2000)]
    assert 0.26 < drawn.count("s") / 2000 < 0.34


def test_rows_are_described_with_the_names_of_their_classes():
    features = datasets.Features(
        {"caption": datasets.Value("string"), "shape": datasets.ClassLabel(names=["circle", "square"])}
    )
    columns = {"caption": ["a red circle", "一只红色的狗"], "shape": [0, -1]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    templates = {"{caption}": 1.0, "one {shape}": 1.0}
    captions = Captions(rows, templates)
    assert captions.columns == ["caption", "shape"]
    assert {captions(rows[0], random.Random(seed)) for seed in range(50)} == {"a red circle", "one circle"}
    assert {captions(rows[1], random.Random(seed)) for seed in range(50)} == {"一只红色的狗"}  # it has no class
    first = Captions(rows.to_iterable_dataset(), templates, cleaning="released", training=False)
    assert {first(rows[0], random.Random(seed)) for seed in range(50)} == {"a red circle"}
    with pytest.raises(BadRow, match="nothing is left of the caption by prompt_cleaning 'released'"):
        first(rows[1], random.Random(0))
    with pytest.raises(ValueError, match="The rows have no column 'title'; they have caption, shape."):
        Captions(rows, {"{title}": 1.0})
