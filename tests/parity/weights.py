"""Deterministic weights by parameter name, so that a golden needs no stored checkpoint."""

import zlib

import numpy as np
import torch


def fill(state_dict, gain=1.0):
    """Overwrite every tensor in place from a generator seeded by its name; returns the dict."""
    for name, tensor in state_dict.items():
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        if not torch.is_floating_point(tensor):
            continue
        if name.endswith("codebook_used"):
            tensor.zero_()
            continue
        values = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), dtype=np.float32))
        if tensor.ndim == 1:  # norm scales and biases
            is_scale = "norm" in name and name.endswith("weight")
            values = 1 + 0.1 * values if is_scale else 0.05 * values
        else:
            fan_in = tensor[0].numel()
            values = values * (gain / fan_in**0.5)
        tensor.copy_(values.to(tensor.dtype))
    return state_dict
