"""The quantizer of embeddings: what is lost, in which order codes stand, what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F

from llamagen_hf import EmbeddingQuantizer
from llamagen_hf.arguments import FieldError


def draw_embeddings(count: int, seed: int) -> torch.Tensor:
    """As CLIP's are: most of the variance lies in a few directions, around a mean that is not zero."""
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed)) * 0.6 ** torch.arange(32)
    return F.normalize((values + 0.3) @ rotation, dim=-1)


@pytest.fixture(scope="module")
def quantizer():
    return EmbeddingQuantizer(32, num_dims=9).fit(draw_embeddings(8000, 1))


def test_test_embeddings_come_back(quantizer):
    embeds = draw_embeddings(500, 2)
    codes = quantizer.encode(embeds)
    assert codes.shape == (500, 9) and codes.min() >= 0 and codes.max() <= 1023
    again = quantizer.decode(codes)
    assert F.cosine_similarity(embeds, again).mean() > 0.99
    assert torch.allclose(again.norm(dim=-1), torch.ones(500), atol=1e-5)
    assert 0.97 < quantizer.kept_variance < 1


def test_codes_stand_by_falling_variance_in_buckets_of_one_size(quantizer):
    embeds = draw_embeddings(8000, 1)
    values = (embeds - quantizer.mean) @ quantizer.components.T
    variances = values.var(0)
    assert (variances[:-1] > variances[1:]).all()
    correlations = torch.corrcoef(values.T) - torch.eye(9)
    assert correlations.abs().max() < 1e-3
    counts = torch.stack([row.bincount(minlength=1024) for row in quantizer.encode(embeds).T])
    assert counts.min() >= 6 and counts.max() <= 9  # of 7.8


def test_saved_equals_loaded(quantizer, tmp_path):
    quantizer.save_pretrained(tmp_path)
    loaded, embeds = EmbeddingQuantizer.from_pretrained(tmp_path), draw_embeddings(20, 3)
    assert torch.equal(loaded.encode(embeds), quantizer.encode(embeds))
    assert torch.equal(loaded.decode(loaded.encode(embeds)), quantizer.decode(quantizer.encode(embeds)))


@pytest.mark.parametrize("how", ["loaded", "cast"])
def test_buckets_stay_exact_in_half_precision(quantizer, tmp_path, how):
    """Two numbers of bfloat16 are up to 1 % apart, and edges of 1,024 buckets are closer."""
    embeds = draw_embeddings(50, 4)
    if how == "loaded":
        quantizer.save_pretrained(tmp_path)
        other = EmbeddingQuantizer.from_pretrained(tmp_path, dtype=torch.bfloat16)
    else:
        other = copy.deepcopy(quantizer).to(torch.bfloat16).half().to("cpu")
    assert {name: buffer.dtype for name, buffer in other.named_buffers()} == dict.fromkeys(
        ("mean", "components", "boundaries", "centers", "kept_variance"), torch.float32
    )
    codes = quantizer.encode(embeds)
    assert torch.equal(other.encode(embeds), codes) and torch.equal(other.decode(codes), quantizer.decode(codes))
    assert other.to("meta").centers.device.type == "meta"


def test_fewer_embeddings_than_buckets_suffice():
    embeds = draw_embeddings(40, 1)
    quantizer = EmbeddingQuantizer(32, num_dims=32).fit(embeds)
    assert F.cosine_similarity(embeds, quantizer.decode(quantizer.encode(embeds))).min() > 0.99
    assert quantizer.centers.isfinite().all()


def test_what_does_not_fit_is_one_sentence(quantizer):
    embeds = draw_embeddings(20, 1)
    for call, message in (
        (lambda: EmbeddingQuantizer(8, 9), "`num_dims` is 9; expected an integer from 1 to 8"),
        (lambda: EmbeddingQuantizer(8, 4, 1), "`num_buckets` is 1"),
        (lambda: EmbeddingQuantizer(32, 25).fit(embeds), "`embeds` holds 20; more than 25 are needed"),
        (lambda: quantizer.encode(embeds[:, :8]), "expected .batch, 32."),
        (lambda: quantizer.encode(embeds / 0), "not finite"),
    ):
        with pytest.raises((FieldError, ValueError), match=message):
            call()
