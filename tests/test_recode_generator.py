"""A generator goes on with the codes of another image tokenizer."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny import build_vq_model


pytest.importorskip("datasets", reason="the training extra is not installed")


@pytest.fixture
def recoding(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "pipelines")
    yield importlib.import_module("recode_generator")
    sys.modules.pop("recode_generator", None)


@pytest.mark.parametrize("kind", ["text", "class"])
def test_the_same_codes_in_another_order_are_drawn_alike(recoding, text_pipe, class_pipe, kind):
    pipe = {"text": text_pipe, "class": class_pipe}[kind]
    torch.manual_seed(0)
    codes = torch.randperm(pipe.vq_model.config.num_vq_embeddings)
    other = copy.deepcopy(pipe.vq_model)
    other.quantize.embedding.weight.data = pipe.vq_model.quantize.embedding.weight.data[codes]
    size = pipe.image_size
    batches = [{"images": torch.rand(32, 3, size, size) * 2 - 1} for _ in range(8)]
    counts = recoding.shared_places(pipe.vq_model, other, batches)
    assert (counts.argmax(1)[counts.sum(1) > 0] == codes[counts.sum(1) > 0]).all()
    counts = torch.nn.functional.one_hot(codes, len(codes)).float()  # all codes, also those that no image has
    recoded = recoding.recode(pipe, other, counts)
    condition = {"prompt": "a red apple"} if kind == "text" else {"class_labels": 1}
    images = [each(**condition, temperature=0.0, output_type="np").images for each in (pipe, recoded)]
    assert abs(images[0] - images[1]).max() < 1e-3


def test_grids_of_two_sizes_are_refused(recoding, class_pipe):
    other = build_vq_model(block_out_channels=(8, 8, 8))
    size = class_pipe.image_size
    with pytest.raises(ValueError, match="The tokenizers have grids of .* expected the same"):
        recoding.shared_places(class_pipe.vq_model, other, [{"images": torch.zeros(1, 3, size, size)}])
