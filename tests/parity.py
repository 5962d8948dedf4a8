"""The parity fixtures: inputs and outputs of the released code, and weights made from names.

They lie in `tests/parity/`; their origin and the meaning of each array stand in its README.md.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch


FOLDER = Path(__file__).parent / "parity"
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
