"""What benchmarks/claims.py compares differs in nothing else."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.llamagen.modeling import rotary_2d  # noqa: E402


FACTS = {"vocab_size": 16, "grid_size": 4, "num_classes": 3}


@pytest.fixture(scope="module")
def variants():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("variants")


@pytest.fixture(scope="module")
def claims(variants):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        yield importlib.import_module("claims")


def loss(model, codes, classes):
    """The loss with a head that does not start at zero."""
    torch.manual_seed(1)
    nn.init.normal_(model.llama.lm_head.weight)
    with torch.no_grad():
        return model(codes, classes).item()


def test_variants_differ_only_in_their_part(variants):
    codes, classes = torch.arange(32).view(2, 16) % 16, torch.tensor([0, 2])
    losses = {}
    for kind in variants.KINDS:
        torch.manual_seed(0)
        losses[kind] = loss(variants.Variant(kind, **FACTS), codes, classes)
    assert losses["rotary"] != pytest.approx(losses["sin-cos"], abs=1e-4)
    # Modulations start as the identity.
    assert losses["rotary + AdaLN"] == pytest.approx(losses["rotary"], abs=1e-6)


def test_sin_cos_rotates_nothing_and_tells_cells_apart(variants):
    torch.manual_seed(0)
    model = variants.Variant("sin-cos", **FACTS)
    cos, sin = rotary_2d(model.llama.config, torch.arange(-16, 0)[None])
    assert (cos == 1).all() and (sin == 0).all()
    assert len({tuple(row.tolist()) for row in model.table}) == 16
    embeddings = model.llama.model.embed_tokens.weight
    assert model.table.square().mean() == pytest.approx(embeddings.square().mean().item(), rel=0.1)
    codes, classes = torch.arange(16)[None], torch.tensor([1])
    before = loss(model, codes, classes)
    model.table.zero_()
    assert loss(model, codes, classes) != pytest.approx(before, abs=1e-4)


def test_adaln_reads_the_class(variants):
    torch.manual_seed(0)
    model = variants.Variant("rotary + AdaLN", **FACTS)
    codes = torch.arange(16)[None] % 16
    before = [loss(model, codes, torch.tensor([label])) for label in (0, 1)]
    with torch.no_grad():
        for modulation in model.modulations:
            modulation.weight[1] += 0.5
    after = [loss(model, codes, torch.tensor([label])) for label in (0, 1)]
    assert after[0] == before[0] and after[1] != pytest.approx(before[1], abs=1e-4)
    assert len(model.modulations) == 2 * variants.SIZES["num_hidden_layers"]


def test_variants_learn_from_the_same_batches(variants, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(variants, "SIZES", sizes)
    torch.manual_seed(0)
    classes = torch.randint(3, (24,))
    codes = (classes[:, None] + torch.arange(16)) % 16
    facts = FACTS | {split: (codes[:, None], classes) for split in ("train", "test")}
    for kind in variants.KINDS:
        losses = variants.learn(facts, kind, 0, (1, 12))
        assert losses == variants.learn(facts, kind, 0, (1, 12))
        assert losses[12] < losses[1] < 2.8


def test_codes_without_subgroups_are_refused(variants, tmp_path):
    for split in ("train", "test"):
        datasets.Dataset.from_dict({"codes": [[[0] * 16]]}).to_parquet(tmp_path / f"{split}-00000.parquet")
    (tmp_path / "codes.json").write_text('{"vocab_size": 16, "grid": [4, 4]}')
    with pytest.raises(ValueError, match="no column 'subgroup'"):
        variants.read_codes(tmp_path)


def test_peak_counts_weights_gradients_and_the_optimizer(claims):
    def build():
        model = nn.Linear(1024, 1024, bias=False)  # 4 MiB
        return model, torch.optim.AdamW(model.parameters())

    def train(model, optimizer):
        model(torch.zeros(1, 1024)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert 16 <= claims.peak_mib(build, train) < 32  # weights, gradients, two averages, and what AdamW computes
    assert 4 <= claims.peak_mib(lambda: build()[:1], lambda model: None) < 4.1


def test_modes_take_turns(claims):
    calls = []
    times = claims.seconds({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    assert calls == list("ababab") and set(times) == {"a", "b"}


@pytest.mark.parametrize("arguments", ["--only speed", "--count 3", "--repeats 0", "--only positions --codes nowhere"])
def test_bad_arguments_are_refused(claims, arguments, capsys):
    with pytest.raises(SystemExit):
        claims.main(arguments.split())
    assert "error:" in capsys.readouterr().err
