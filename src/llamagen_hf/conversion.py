"""Conversion of the released checkpoints, under the name that others import it by."""

from .llamagen.conversion import (
    VARIANTS,
    convert_checkpoint,
    convert_transformer_state_dict,
    load_released,
    transformer_from_released,
    vq_model_from_released,
)


__all__ = [
    "VARIANTS",
    "convert_checkpoint",
    "convert_transformer_state_dict",
    "load_released",
    "transformer_from_released",
    "vq_model_from_released",
]
