"""Heads filled up with zeros to a width that attention kernels take: the released 3B's are 100 wide."""

import torch
import torch.nn.functional as F


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
