"""The kernel distance between two sets of features (KID, arXiv 1801.01401)."""

import numpy as np
import torch

from .features import as_features, check_same_width


def kernel_distance(
    reference_features: np.ndarray | torch.Tensor,
    sample_features: np.ndarray | torch.Tensor,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The squared maximum mean discrepancy under the kernel (x'y / d + 1)^3; KID on Inception's features.

    The unbiased estimate (Binkowski et al. 2018, arXiv 1801.01401, equation 4) on random subsets of both sets, with
    the numbers of torch-fidelity.

    Args:
        reference_features (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Features of the reference images.
        sample_features (`np.ndarray` or `torch.Tensor` of shape `(m, d)`): Those of the images to judge.
        num_subsets (`int`, *optional*, defaults to 100): How many subsets to draw.
        subset_size (`int`, *optional*, defaults to 1000): Features of a subset, or all where there are fewer.
        seed (`int`, *optional*, defaults to 0): Seed of the choice of subsets.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over the subsets. The mean may be a little below 0.

    Raises:
        ValueError: In one sentence, if there are fewer than two features, if they are not finite, or differ in width.
    """
    for name, value, least in (("num_subsets", num_subsets, 1), ("subset_size", subset_size, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` is {value}; expected an integer of at least {least}.")
    reference = as_features(reference_features, "reference features", 2).double()
    samples = as_features(sample_features, "sample features", 2).double()
    check_same_width(reference.shape[1], samples.shape[1])
    size, generator = min(subset_size, len(reference), len(samples)), torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(num_subsets):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:size]] for features in (reference, samples)
        )
        within = sum((_kernel(z, z).sum() - _kernel_of_self(z).sum()) / (size * (size - 1)) for z in (x, y))
        estimates.append(within - 2 * _kernel(x, y).mean())
    estimates = torch.stack(estimates)
    return estimates.mean().item(), estimates.std(correction=0).item()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_of_self(x: torch.Tensor) -> torch.Tensor:
    return (x.square().mean(1) + 1) ** 3
