"""Metrics of features: Frechet distance (FID), Inception Score and kernel distance (KID)."""

import numpy as np
import torch

from ..arguments import is_count


Features = np.ndarray | torch.Tensor


def as_features(features: Features, name: str, minimum: int) -> torch.Tensor:
    """Features as a tensor on the CPU, in the floating-point type they came in.

    Args:
        features (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): One row per image.
        name (`str`): What errors call them.
        minimum (`int`): The least number of rows.

    Raises:
        ValueError: If they are not finite numbers of that shape, or too few.
    """
    try:
        features = torch.as_tensor(features).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"The {name} must be an array of numbers of shape (n, d).") from error
    if features.ndim != 2 or features.is_complex() or features.shape[1] == 0:
        raise ValueError(f"The {name} have shape {tuple(features.shape)}; expected real numbers of shape (n, d).")
    if not features.is_floating_point():
        features = features.double()
    if len(features) < minimum:
        raise ValueError(f"There are {len(features)} {name}; at least {minimum} are needed.")
    bad = (~features.isfinite()).any(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} {name} hold NaN or infinity, the first in row {int(bad.int().argmax())}."
        )
    return features


def check_same_width(reference: int, samples: int) -> None:
    """Raise a `ValueError` if two sets of features differ in width."""
    if reference != samples:
        raise ValueError(
            f"The reference features are {reference} wide and the sample features {samples}; they must be equal."
        )


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, accumulated in float64.

    Batches are merged by Chan's update of the scatter around the mean, which stays exact where means are large
    compared with deviations. The batch size changes the last digits of float64 at most.

    Attributes:
        count (`int`): Number of features so far.
        mean (`torch.Tensor` of shape `(d,)`): Their mean.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf.evaluation import FeatureStatistics

    >>> statistics = FeatureStatistics()
    >>> for batch in torch.randn(100, 8).split(32):
    ...     statistics.update(batch)
    >>> statistics.covariance.shape
    torch.Size([8, 8])
    ```
    """

    def __init__(self):
        self.count = 0
        self.mean: torch.Tensor | None = None
        self._scatter: torch.Tensor | None = None

    @classmethod
    def from_moments(cls, mean: Features, covariance: Features, count: int) -> "FeatureStatistics":
        """Statistics that were computed elsewhere.

        Args:
            mean (`np.ndarray` or `torch.Tensor` of shape `(d,)`): The mean.
            covariance (`np.ndarray` or `torch.Tensor` of shape `(d, d)`): The covariance, divided by `count - 1`.
            count (`int`): The number of features they are computed from.

        Raises:
            ValueError: If the shapes do not fit, or the values are not finite.
        """
        mean, covariance = (torch.as_tensor(value).double() for value in (mean, covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"Mean and covariance have shapes {tuple(mean.shape)} and {tuple(covariance.shape)}; expected (d,) "
                "and (d, d)."
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError("Mean and covariance must be finite.")
        statistics = cls()
        statistics.count, statistics.mean, statistics._scatter = count, mean, covariance * (count - 1)
        return statistics

    def update(self, features: Features) -> None:
        """Add features `(n, d)`.

        Raises:
            ValueError: If they are not finite, or their width differs from that of earlier ones.
        """
        features = as_features(features, "features", 1).double()
        count, mean = len(features), features.mean(0)
        centred = features - mean
        scatter = centred.T @ centred
        if self.mean is None:
            self.count, self.mean, self._scatter = count, mean, scatter
            return
        check_same_width(len(self.mean), len(mean))
        total, step = self.count + count, mean - self.mean
        self._scatter += scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean += step * (count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """Covariance `(d, d)`, divided by `count - 1`; a `ValueError` if there are fewer than two features."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 features; there are {self.count}.")
        return self._scatter / (self.count - 1)


def frechet_distance(
    reference_features: Features | FeatureStatistics, sample_features: Features | FeatureStatistics
) -> float:
    r"""Squared Frechet distance between two Gaussians fitted to features; FID on Inception's (arXiv 1706.08500).

    ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), equation 6 of the paper, as `FIDStatistics` of ADM's `evaluator.py`
    computes it. The trace of the root is the sum of the singular values of F1 F2', for any factors C = F' F, so no
    matrix root is taken. Covariances may therefore be singular, as they are with fewer features than dimensions;
    SciPy's root is inexact or undefined there.

    Args:
        reference_features (`np.ndarray` or `torch.Tensor` of shape `(n, d)`, or [`FeatureStatistics`]):
            Features of the reference images, or their statistics.
        sample_features (`np.ndarray` or `torch.Tensor` of shape `(m, d)`, or [`FeatureStatistics`]):
            Features of the images to judge, or their statistics.

    Returns:
        `float`: At least 0; 0 for equal means and covariances.

    Raises:
        ValueError: If there are fewer than two features, if they are not finite, or if their widths differ.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf.evaluation import frechet_distance

    >>> features = torch.randn(100, 8)
    >>> frechet_distance(features, features) < 1e-9
    True
    ```
    """
    mean, factor = _moments(reference_features, "reference features")
    other_mean, other_factor = _moments(sample_features, "sample features")
    check_same_width(len(mean), len(other_mean))
    overlap = torch.linalg.svdvals(factor @ other_factor.T).sum()
    step = mean - other_mean
    distance = step @ step + factor.square().sum() + other_factor.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)


def _moments(features: Features | FeatureStatistics, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean `(d,)` and a factor F `(r, d)` of the covariance F' F."""
    if not isinstance(features, FeatureStatistics):
        features = as_features(features, name, 2).double()
        if len(features) <= features.shape[1]:  # the rows themselves are a factor, and a smaller one
            mean = features.mean(0)
            return mean, (features - mean) / (len(features) - 1) ** 0.5
        statistics = FeatureStatistics()
        statistics.update(features)
        features = statistics
    values, vectors = torch.linalg.eigh(features.covariance)
    return features.mean, values.clamp(min=0).sqrt()[:, None] * vectors.T


def inception_score(logits: Features, split_size: int = 5000) -> float:
    """Inception Score: how confident a classifier is about each image, and how varied the images are.

    exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498) for each `split_size` images in the given
    order, the last split holding the remainder; then the mean over splits, as in ADM's `evaluator.py`. There the
    logits are Inception's 1008 without bias.

    Args:
        logits (`np.ndarray` or `torch.Tensor` of shape `(n, classes)`): A classifier's logits.
        split_size (`int`, *optional*, defaults to 5000): Images per split.

    Returns:
        `float`: From 1 to the number of classes.

    Raises:
        ValueError: If the logits are not finite numbers of that shape, or `split_size` is not a positive integer.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf.evaluation import inception_score

    >>> round(inception_score(100 * torch.eye(10)), 3)
    10.0
    ```
    """
    if not is_count(split_size):
        raise ValueError(f"`split_size` is {split_size}; expected an integer of at least 1.")
    log_shares = as_features(logits, "logits", 1).double().log_softmax(1)
    scores = []
    for part in log_shares.split(split_size):
        marginal = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def kernel_distance(
    reference_features: Features,
    sample_features: Features,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel (x'y / d + 1)^3; KID on Inception's features.

    The unbiased estimate (Binkowski et al. 2018, arXiv 1801.01401, equation 4) on random subsets of both sets, with
    torch-fidelity's defaults.

    Args:
        reference_features (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Features of the reference images.
        sample_features (`np.ndarray` or `torch.Tensor` of shape `(m, d)`): Features of the images to judge.
        num_subsets (`int`, *optional*, defaults to 100): Number of random subsets.
        subset_size (`int`, *optional*, defaults to 1000): Features per subset, or all where there are fewer.
        seed (`int`, *optional*, defaults to 0): Seed of the random subsets.

    Returns:
        `tuple[float, float]`: Mean and standard deviation over the subsets. The mean may be a little below 0.

    Raises:
        ValueError: If there are fewer than two features, if they are not finite, or if their widths differ.
    """
    for name, value, least in (("num_subsets", num_subsets, 1), ("subset_size", subset_size, 2)):
        if not is_count(value) or value < least:
            raise ValueError(f"`{name}` is {value}; expected an integer of at least {least}.")
    reference = as_features(reference_features, "reference features", 2).double()
    samples = as_features(sample_features, "sample features", 2).double()
    check_same_width(reference.shape[1], samples.shape[1])
    size, generator = min(subset_size, len(reference), len(samples)), torch.Generator().manual_seed(seed)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    estimates = []
    for _ in range(num_subsets):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:size]] for features in (reference, samples)
        )
        within = sum(
            (kernel(z, z).sum() - ((z.square().mean(1) + 1) ** 3).sum()) / (size * (size - 1)) for z in (x, y)
        )
        estimates.append(within - 2 * kernel(x, y).mean())
    estimates = torch.stack(estimates)
    return estimates.mean().item(), estimates.std(correction=0).item()
