"""Small Llamas that differ in one part, trained side by side on the same batches: for benchmarks/claims.py.

- rotary:         the 2D rotary embedding, as in this package
- sin-cos:        no rotation; the 2D sine-cosine embedding of MAE and DiT is added to the codes' embeddings
- rotary + AdaLN: the class also scales and shifts the output of each norm, as in DiT (arXiv 2212.09748)

All have the class as their first position, and neither dropout nor guidance.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import nn

from llamagen_hf import LlamaGenConfig, LlamaGenForConditionalGeneration
from llamagen_hf.llamagen.training.codes import read_codes_info


KINDS = ("rotary", "sin-cos", "rotary + AdaLN")
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
NO_DROPOUT = dict.fromkeys(("embedding_dropout", "residual_dropout", "ffn_dropout", "condition_dropout"), 0.0)
BATCH_SIZE, LEARNING_RATE, WARMUP = 16, 3e-3, 20


class Variant(nn.Module):
    """A class-conditional Llama of one of `KINDS`.

    Args:
        kind (`str`): One of `KINDS`.
        vocab_size (`int`): Number of codes.
        grid_size (`int`): Side of the grid of codes.
        num_classes (`int`): Number of classes.
    """

    def __init__(self, kind: str, vocab_size: int, grid_size: int, num_classes: int):
        super().__init__()
        config = LlamaGenConfig(
            vocab_size=vocab_size, grid_size=grid_size, num_classes=num_classes, condition_rotary="identity",
            **SIZES, **NO_DROPOUT,
        )  # fmt: skip
        self.llama = LlamaGenForConditionalGeneration(config)
        nn.init.zeros_(self.llama.lm_head.weight)
        table = None
        if kind == "sin-cos":  # as large as the embeddings that it is added to
            table = get_2d_sincos_pos_embed(config.hidden_size, grid_size).float()
            table = table * config.initializer_range / table.square().mean().sqrt()
        self.register_buffer("table", table)
        self.modulations = nn.ModuleList()
        if kind == "rotary + AdaLN":
            for layer in self.llama.model.layers:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    self._modulate(norm, num_classes)

    def _modulate(self, norm: nn.Module, num_classes: int) -> None:
        modulation = nn.Embedding(num_classes, 2 * self.llama.config.hidden_size)
        nn.init.zeros_(modulation.weight)  # so that all variants start as the same function
        self.modulations.append(modulation)

        def change(module, inputs, output):
            scale, shift = modulation(self.classes)[:, None].chunk(2, dim=-1)
            return output * (1 + scale) + shift

        norm.register_forward_hook(change)

    def forward(self, codes: torch.LongTensor, classes: torch.LongTensor) -> torch.Tensor:
        """Mean cross-entropy in nats of codes `(batch, n)` of classes `(batch,)`."""
        self.classes = classes
        ids = torch.cat([self.llama.config.vocab_size + classes[:, None], codes[:, :-1]], dim=1)
        if self.table is None:
            inputs = {"input_ids": ids}
        else:
            length = ids.shape[1]
            embeds = self.llama.model.embed_tokens(ids) + F.pad(self.table[: length - 1], (0, 0, 1, 0))
            # Positions before the grid are not rotated.
            inputs = {"inputs_embeds": embeds, "position_ids": torch.arange(-length, 0)[None]}
        logits = self.llama(**inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def read_codes(folder: str | Path) -> dict:
    """The codes of emoji that a recipe extracted, with their subgroups as classes.

    Returns:
        `dict`: `vocab_size`, `grid_size` and `num_classes`; by split, `codes` `(rows, crops, n)` and `classes`.

    Raises:
        ValueError: There are no codes, or they have no subgroups.
    """
    info = read_codes_info(folder)
    facts = {"vocab_size": info["vocab_size"], "grid_size": info["grid"][0]}
    files = {split: str(Path(folder) / f"{split}-*.parquet") for split in ("train", "test")}
    for split, rows in load_dataset("parquet", data_files=files).items():
        if "subgroup" not in rows.features:
            raise ValueError(f"The codes at {str(folder)!r} have no column 'subgroup'.")
        facts["num_classes"] = rows.features["subgroup"].num_classes
        # (rows, crops, n) and (rows,)
        facts[split] = torch.tensor(list(rows["codes"])), torch.tensor(list(rows["subgroup"]))
    return facts


def learn(facts: dict, kind: str, seed: int, measured: Iterable[int]) -> dict[int, float]:
    """Train a variant; seeds decide weights and batches, and batches are the same for all variants.

    Args:
        facts (`dict`): What [`read_codes`] returns.
        kind (`str`): One of `KINDS`.
        seed (`int`): Of the weights and the batches.
        measured (`Iterable[int]`): Steps after which the test loss is measured; the training ends with the last.

    Returns:
        `dict[int, float]`: Test loss in nats a code, by step.
    """
    torch.manual_seed(seed)
    model = Variant(kind, facts["vocab_size"], facts["grid_size"], facts["num_classes"])
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, 1.0))
    (codes, classes), batches, losses = facts["train"], torch.Generator().manual_seed(seed), {}
    for step in range(1, max(measured) + 1):
        rows = torch.randint(len(codes), (BATCH_SIZE,), generator=batches)
        crops = torch.randint(codes.shape[1], (BATCH_SIZE,), generator=batches)
        model(codes[rows, crops], classes[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in measured:
            losses[step] = test_loss(model, *facts["test"])
    return losses


@torch.no_grad()
def test_loss(model: Variant, codes: torch.LongTensor, classes: torch.LongTensor) -> float:
    """Mean loss of the first crops."""
    parts = zip(codes[:, 0].split(BATCH_SIZE), classes.split(BATCH_SIZE), strict=True)
    return sum(model(part, labels).item() * len(part) for part, labels in parts) / len(codes)
