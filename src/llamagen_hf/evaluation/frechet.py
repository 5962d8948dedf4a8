"""The Frechet distance between Gaussians that fit two sets of features (FID, arXiv 1706.08500)."""

import numpy as np
import torch

from .features import as_features, check_same_width


class FeatureStatistics:
    """Mean and covariance of features that come batch by batch, summed up in float64.

    Batches are merged by Chan's update of the scatter about the mean, which loses nothing where means are large
    against deviations. How the features are cut into batches changes the last digits of float64 at most.

    Attributes:
        count (`int`): Features so far.
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
    def from_moments(
        cls, mean: np.ndarray | torch.Tensor, covariance: np.ndarray | torch.Tensor, count: int
    ) -> "FeatureStatistics":
        """Statistics that were computed elsewhere.

        Args:
            mean (`np.ndarray` or `torch.Tensor` of shape `(d,)`): The mean.
            covariance (`np.ndarray` or `torch.Tensor` of shape `(d, d)`): The covariance, divided by `count - 1`.
            count (`int`): Of how many features.

        Raises:
            ValueError: In one sentence, if their shapes do not fit or they are not finite.
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

    def update(self, features: np.ndarray | torch.Tensor) -> None:
        """Add features `(n, d)`.

        Raises:
            ValueError: In one sentence, if they are not finite, or of another width than those before.
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
    reference_features: np.ndarray | torch.Tensor | FeatureStatistics,
    sample_features: np.ndarray | torch.Tensor | FeatureStatistics,
) -> float:
    r"""The squared Frechet distance between Gaussians of the same mean and covariance; FID on Inception's features.

    ||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), equation 6 of arXiv 1706.08500, as `FIDStatistics` of ADM's
    `evaluator.py` computes it. The trace of the root is the sum of the singular values of F1 F2', for any factors
    C = F' F, and so needs no root of a product: covariances may be singular, as they are with fewer features than
    dimensions, where the root that SciPy gives is inexact or does not exist.

    Args:
        reference_features (`np.ndarray` or `torch.Tensor` of shape `(n, d)`, or [`FeatureStatistics`]):
            Features of the reference images, or their statistics.
        sample_features (`np.ndarray` or `torch.Tensor` of shape `(m, d)`, or [`FeatureStatistics`]):
            Those of the images to judge.

    Returns:
        `float`: At least 0; 0 for equal means and covariances.

    Raises:
        ValueError: In one sentence, if there are fewer than two features, if they are not finite, or differ in width.

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


def _moments(features: np.ndarray | torch.Tensor | FeatureStatistics, name: str) -> tuple[torch.Tensor, torch.Tensor]:
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
