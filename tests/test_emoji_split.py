"""The emoji that are held out of the training in one of their styles."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")


@pytest.fixture
def unseen_style(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "pipelines")
    yield importlib.import_module("split_emoji").unseen_style
    sys.modules.pop("split_emoji", None)


def test_each_held_out_emoji_stays_in_two_other_styles(unseen_style):
    styles = ("flat", "3d", "noto", "blob", "twemoji")
    names = [(f"{emoji:X}", style) for emoji in range(200) for style in styles[: 1 + emoji % 5]]
    rows = datasets.Dataset.from_dict({"hexcode": [e for e, _ in names], "style": [s for _, s in names]})
    chosen = unseen_style(rows)
    assert len(chosen) == 30  # 5 % of 600
    held_out = Counter(names[index][0] for index in chosen)
    left = Counter(emoji for index, (emoji, _) in enumerate(names) if index not in chosen)
    assert set(held_out.values()) == {1} and min(left[emoji] for emoji in held_out) >= 2
    assert len({names[index][1] for index in chosen}) > 1

    order = list(reversed(range(len(rows))))
    again = {names[order[index]] for index in unseen_style(rows.select(order))}
    assert again == {names[index] for index in chosen}  # whatever the order of the rows
