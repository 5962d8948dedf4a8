"""Features of images as matrices: what every metric here is computed from."""

import numpy as np
import torch


def as_features(features: np.ndarray | torch.Tensor, name: str, minimum: int) -> torch.Tensor:
    """Features as a tensor on the CPU, in the floating point type they came in.

    Args:
        features (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): One row an image.
        name (`str`): What they are called in an error.
        minimum (`int`): How many rows there must be.

    Raises:
        ValueError: In one sentence, if they are no finite numbers of that shape, or too few.
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
    if not features.isfinite().all():
        bad = (~features.isfinite()).any(1)
        raise ValueError(
            f"{int(bad.sum())} of {len(bad)} {name} hold NaN or infinity, the first in row {int(bad.int().argmax())}."
        )
    return features


def check_same_width(reference: int, samples: int) -> None:
    """Raise a `ValueError` if two sets of features differ in width."""
    if reference != samples:
        raise ValueError(
            f"The reference features are {reference} wide and the sample features {samples}; they must be alike."
        )
