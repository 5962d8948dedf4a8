"""Rows of codes as samples: captions, classes, stored text states, and codes of the wrong tokenizer."""

import json
import random
from functools import partial

import pytest
import torch
from tiny import build_text_encoder
from transformers import ByT5Tokenizer


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.conditioning.cache import TextFeatures  # noqa: E402
from llamagen_hf.conditioning.text import encode_tokens, tokenize_prompts  # noqa: E402
from llamagen_hf.data.samples import BadRow  # noqa: E402
from llamagen_hf.llamagen.training.codes import CodeCollator, CodeSamples, load_codes, read_codes_info  # noqa: E402


FEATURES = datasets.Features(
    {
        "codes": datasets.List(datasets.List(datasets.Value("int32"))),
        "caption": datasets.Value("string"),
        "shape": datasets.ClassLabel(names=["circle", "square"]),
    }
)


def build_rows(**columns):
    defaults = {
        "codes": [[[0, 1, 2, 3], [3, 2, 1, 0]]] * 3,
        "caption": ["a red circle", "a blue square", ""],
        "shape": [0, 1, -1],
    }
    return datasets.Dataset.from_dict(defaults | columns, features=FEATURES)


def test_training_draws_crops_and_templates_and_tests_take_the_first():
    rows = build_rows()
    templates = {"{caption}": 1.0, "one {shape}": 1.0}
    samples = CodeSamples(rows, templates)
    drawn = [samples(rows[0], random.Random(seed)) for seed in range(50)]
    assert {tuple(sample["codes"]) for sample in drawn} == {(0, 1, 2, 3), (3, 2, 1, 0)}
    assert {sample["caption"] for sample in drawn} == {"a red circle", "one circle"}
    first = CodeSamples(rows, templates, training=False)
    assert first(rows[0], random.Random(7)) == {"codes": [0, 1, 2, 3], "caption": "a red circle"}
    with pytest.raises(BadRow, match="no caption"):
        samples(rows[2], random.Random(0))


def test_classes_out_of_range_are_bad_rows():
    rows = build_rows()
    samples = CodeSamples(rows, label_column="shape", num_classes=2, training=False)
    batch = CodeCollator()([samples(rows[i], random.Random(0)) for i in (0, 1)])
    assert batch["class_labels"].tolist() == [0, 1] and batch["codes"].shape == (2, 4)
    with pytest.raises(BadRow, match=r"label out of range: -1 is not in 0..1"):
        samples(rows[2], random.Random(0))


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="The codes have no column 'title'; they have .'codes', 'caption', 'shape'."):
        CodeSamples(build_rows(), {"{title}": 1.0})
    with pytest.raises(ValueError, match="every caption template is one column"):
        CodeSamples(build_rows(), {"a {caption}": 1.0}, stored_states=True)


def test_stored_states_give_the_batch_that_the_encoder_gives(tmp_path):
    encoder, tokenizer = build_text_encoder(), ByT5Tokenizer()
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    features = TextFeatures(str(tmp_path), 12, "unicode", device=torch.device("cpu"), dtype=torch.float32)
    captions = ["a cat", "a longer caption than fits"]
    rows = datasets.Dataset.from_dict(
        {"codes": [[[0, 1]], [[1, 0]]], "caption": captions, "caption_states": features.encode(captions)}
    )
    samples = CodeSamples(rows, {"{caption}": 1.0}, stored_states=True)
    collate = CodeCollator(condition_length=12, condition_dim=features.dim)
    batch = collate([samples(row, random.Random(0)) for row in rows])
    with torch.no_grad():
        states, mask = encode_tokens(encoder, *tokenize_prompts(tokenizer, captions, 12, "unicode"), 12)
    torch.testing.assert_close(batch["prompt_embeds"], states.half().float(), rtol=0, atol=0)
    assert torch.equal(batch["prompt_attention_mask"], mask)


def test_codes_of_another_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="run extract_codes first"):
        load_codes(str(tmp_path), "train", "0123")
    (tmp_path / "codes.json").write_text(json.dumps({"vq_model_fingerprint": "4567"}))
    with pytest.raises(ValueError, match="come from another tokenizer .4567, not 0123."):
        load_codes(str(tmp_path), "train", "0123")
    with pytest.raises(ValueError, match="are incomplete; start extract_codes again"):
        load_codes(str(tmp_path), "train", "4567")
    (tmp_path / "codes.json").write_text(json.dumps({"vq_model_fingerprint": "4567", "rows": {"train": 3}}))
    build_rows().to_parquet(tmp_path / "train-00000.parquet")
    rows = load_codes(str(tmp_path), "train", "4567")
    assert rows.features["shape"].names == ["circle", "square"] and len(rows) == 3
    assert load_codes(str(tmp_path), "test", "4567") is None


def test_codes_of_earlier_versions_load(tmp_path):
    info = {"tokenizer": "runs/tokenizer", "tokenizer_fingerprint": "4567", "rows": {"train": 3}}
    (tmp_path / "codes.json").write_text(json.dumps(info))
    build_rows().to_parquet(tmp_path / "train-00000.parquet")
    assert read_codes_info(tmp_path) == {
        "vq_model": "runs/tokenizer", "vq_model_fingerprint": "4567", "rows": {"train": 3}
    }  # fmt: skip
    assert len(load_codes(tmp_path, "train", "4567")) == 3


def test_captions_are_tokenized_in_the_batch():
    collate = CodeCollator(partial(tokenize_prompts, ByT5Tokenizer(), length=6, cleaning="unicode"))
    batch = collate([{"codes": [0, 1], "caption": "a cat"}, {"codes": [2, 3], "caption": "x"}])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [6, 2]
