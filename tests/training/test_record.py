"""What a training says of itself, and what earlier versions wrote."""

import json

import pytest


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.families import FAMILIES  # noqa: E402
from llamagen_hf.publishing.cards import codes_card, read_metrics  # noqa: E402
from llamagen_hf.training.record import read_facts  # noqa: E402


def test_facts_of_earlier_versions_have_todays_names(tmp_path):
    assert read_facts(tmp_path) == read_facts("user/name") == {}
    facts = {"data": {"dataset": "a"}, "tokenizer": {"settings": {}, "metrics": {"test_psnr": 20.0}}}
    (tmp_path / "training.json").write_text(json.dumps(facts))
    assert read_facts(tmp_path) == {"data": facts["data"], "vq_model": facts["tokenizer"]}


@pytest.mark.parametrize("name", ["vq_model", "tokenizer"])
def test_cards_read_facts_and_codes_of_every_version(name):
    metrics = {"metrics": {"test_psnr": 20.0}}
    assert [value for _, _, value, _ in read_metrics({name: metrics})] == [20.0]
    info = {f"{name}_fingerprint": "4567", "rows": {"train": 3}, "grid": [4, 4], "vocab_size": 8, "dataset": "a"}
    _, texts = codes_card(FAMILIES[0], "user/codes", info)
    assert "fingerprint `4567`" in texts["summary"]
