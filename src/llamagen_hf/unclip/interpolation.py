"""The way from one image embedding to another."""

import torch
import torch.nn.functional as F


def slerp(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
    """Spherical interpolation, as DALL-E 2 goes from image to image (arXiv 2204.06125, section 3.2).

    Between opposite points, where there is no shortest way, it goes by one of them all.

    Args:
        a, b (`torch.Tensor` of shape `(dim,)`): Where the way begins and ends, both of length 1.
        weight (`float`): How much of it to go, in [0, 1].

    Returns:
        `torch.Tensor` of shape `(dim,)`: Of length 1.
    """
    angle = torch.atan2((a - b).norm(), (a + b).norm()) * 2  # exact for near points, unlike the arc cosine
    if angle < 1e-4:
        return F.normalize(torch.lerp(a, b, weight), dim=-1)
    if torch.pi - angle < 1e-4:
        b = F.normalize(b + 1e-3 * torch.eye(len(b)).to(b)[b.abs().argmin()], dim=-1)
        angle = torch.atan2((a - b).norm(), (a + b).norm()) * 2
    point = ((1 - weight) * angle).sin() * a + (weight * angle).sin() * b
    return F.normalize(point / angle.sin(), dim=-1)
