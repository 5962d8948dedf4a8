"""The emoji in tests/emoji as rows of the data that the scoreboard reads, and a tiny network that judges them."""

import json
from pathlib import Path

import datasets
import torch
from PIL import Image
from transformers import AutoTokenizer

from llamagen_hf.loading.checkpoint import EMOJI_CHECKPOINT


EMOJI = Path(__file__).parent / "emoji"  # 40 images of the training split, in one style


def read_rows() -> datasets.Dataset:
    """All 40 of them."""
    facts = [json.loads(line) for line in (EMOJI / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    columns = {name: [fact[name] for fact in facts] for name in ("caption", "tags", "group", "subgroup")}
    columns["image"] = [Image.open(EMOJI / fact["file_name"]).convert("RGB") for fact in facts]
    columns["hexcode"] = [Path(fact["file_name"]).stem for fact in facts]
    columns["style"] = ["fluent flat"] * len(facts)
    kinds = {name: datasets.Value("string") for name in ("caption", "group", "hexcode", "style", "subgroup")}
    features = datasets.Features(kinds | {"image": datasets.Image(), "tags": datasets.List(datasets.Value("string"))})
    return datasets.Dataset.from_dict(columns, features=features)


def build_network(benchmarks: dict, rows: datasets.Dataset) -> tuple:
    """A network of the scoreboard's kind with new weights, and its tokenizer; `benchmarks` are modules by name."""
    torch.manual_seed(0)
    config = benchmarks["emoji_classifier"].EmojiClassifierConfig(
        layer_type="basic", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], image_size=16,
        classes=benchmarks["train_scoreboard"].class_names(rows),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(EMOJI_CHECKPOINT / "tokenizer")
    return benchmarks["emoji_classifier"].EmojiClassifier(config), tokenizer
