"""The parity fixtures: inputs and outputs of the released code, and weights made from names.

They lie in `tests/parity/`; their origin and the meaning of each array stand in its README.md.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

from llamagen_hf import LlamaGenConfig, LlamaGenForConditionalGeneration
from llamagen_hf.llamagen.conversion import convert_transformer_state_dict


FOLDER = Path(__file__).parent / "parity"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "grid_size": 4,
}
_spec = importlib.util.spec_from_file_location("parity_weights", FOLDER / "weights.py")
weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(weights)


def released_state_dict(name: str) -> dict[str, torch.Tensor]:
    """A checkpoint in the released layout."""
    shapes = json.loads((FOLDER / f"{name}.json").read_text())
    return weights.fill(
        {key: torch.zeros(shape) for key, shape in shapes.items()}, gain=1.0 if name.startswith("vq") else 1.5
    )


def goldens(name: str) -> dict[str, torch.Tensor]:
    """Inputs and outputs of the released code; codes as long."""
    arrays = np.load(FOLDER / f"{name}.npz")
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays}
    return {key: value.long() if value.dtype == torch.int32 else value for key, value in tensors.items()}


def released_transformer(name: str) -> LlamaGenForConditionalGeneration:
    """The model of a checkpoint in the released layout."""
    condition = (
        {"num_classes": 10}
        if name == "c2i_tiny"
        else {
            "conditioning": "text",
            "condition_length": 120,
            "condition_dim": 24,
            "condition_rotary": "zero",
        }
    )
    config = LlamaGenConfig(**SIZES, **condition)
    model = LlamaGenForConditionalGeneration(config).eval()
    model.load_state_dict(convert_transformer_state_dict(released_state_dict(name), config))
    return model
