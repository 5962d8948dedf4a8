"""Models of which each process holds a part (FSDP), made whole again to be saved."""

import torch
from diffusers import ConfigMixin
from torch import nn


def state_of_part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights of one module out of a state in which their names begin with `prefix`."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def unsharded(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a sharded model that has all of its weights.

    Args:
        model (`diffusers.ModelMixin` or `transformers.PreTrainedModel`): The model.
        state (`dict[str, torch.Tensor]`): All of its weights.
    """
    kind, config = type(model), model.config
    whole = kind.from_config(config) if isinstance(model, ConfigMixin) else kind(config)
    whole.load_state_dict(state)
    return whole
