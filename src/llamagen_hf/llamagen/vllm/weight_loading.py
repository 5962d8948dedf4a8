"""Weights of a checkpoint, as vLLM's layers take them."""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F

from ..configuration import LlamaGenConfig
from ..modeling import LlamaGenTextProjector
from .twin_config import LlamaGenTwinConfig


# Parts that vLLM's layers hold as one: what they are called in the checkpoint, there, and what the part is.
STACKED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
TEXT_WEIGHTS = ("model.text_projector.", "model.uncond_embedding.")


def vllm_weights(
    weights: Iterable[tuple[str, torch.Tensor]], twin: LlamaGenTwinConfig
) -> Iterator[tuple[str, torch.Tensor, str | int | None]]:
    """Names in vLLM's model, weights, and which part of a stacked weight each is.

    Args:
        weights (`Iterable[tuple[str, torch.Tensor]]`): The checkpoint's.
        twin ([`LlamaGenTwinConfig`]): Gives the width of heads.
    """
    head_dim = twin.generator_config.head_dim
    for name, weight in weights:
        *path, part, kind = name.split(".")
        if part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = pad_heads(weight, head_dim, twin.head_dim, dim=int(part == "o_proj"))
        elif part == "embed_tokens":
            weight = F.pad(weight, (0, 0, 0, twin.num_input_ids - len(weight)))
        target, shard = STACKED.get(part, (part, None))
        yield ".".join([*path, target, kind]), weight, shard


def pad_heads(tensor: torch.Tensor, head_dim: int, width: int, dim: int = 0) -> torch.Tensor:
    """Fill up the heads along one dimension with zeros.

    Rotation pairs the first half of a head with its second, so each half is filled up. Zeros turn into zeros, they add
    nothing to the product of a query and a key, and those of the values meet zeros in the output projection.

    Args:
        tensor (`torch.Tensor`): A weight or a rotary table, a multiple of `head_dim` long along `dim`.
        head_dim (`int`): Width of a head.
        width (`int`): The width that it gets.
        dim (`int`, *optional*, defaults to 0): Where the heads are.
    """
    halves = tensor.movedim(dim, -1).unflatten(-1, (-1, head_dim // 2))
    return F.pad(halves, (0, (width - head_dim) // 2)).flatten(-2).movedim(-1, dim)


class ConditionWeights:
    """The weights that say what no condition is.

    Args:
        config ([`LlamaGenConfig`]): The checkpoint's.
    """

    def __init__(self, config: LlamaGenConfig):
        self.config = config
        self.kept: dict[str, torch.Tensor] = {}

    def keep(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass weights on, but for those of the text condition, and keep what is needed of them."""
        for name, weight in weights:
            if name.startswith(TEXT_WEIGHTS):
                self.kept[name.removeprefix("model.")] = weight
                continue
            if name == "model.embed_tokens.weight" and self.config.conditioning == "class":
                self.kept["null_class"] = weight[self.config.null_class_id :]
            yield name, weight

    def null_embeddings(self) -> torch.Tensor:
        """Embeddings `(condition_length, hidden_size)` that stand for no condition."""
        if self.config.conditioning == "class":
            return self.kept["null_class"]
        prompt = self.kept.pop("uncond_embedding.weight")
        with torch.no_grad():
            return build_text_projector(self.config, self.kept, prompt.device)(prompt)


def build_text_projector(
    config: LlamaGenConfig, weights: dict[str, torch.Tensor], device: torch.device
) -> LlamaGenTextProjector:
    """The projector alone, from the weights `text_projector.*` in their own dtype."""
    with torch.device("meta"):
        projector = LlamaGenTextProjector(config)
    state = {name.removeprefix("text_projector."): weight.to(device) for name, weight in weights.items()}
    projector.load_state_dict(state, assign=True)
    return projector.requires_grad_(False)
