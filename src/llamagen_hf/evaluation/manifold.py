"""Precision and recall from nearest neighbours of features (arXiv 1904.06991), as ADM measures them."""

import math

import torch

from ..arguments import is_count
from .metrics import Features, as_features, check_same_width


# Rows and columns of distances that ADM's evaluator computes together. If one of them overflows half precision, it
# computes the whole block in single precision.
BLOCK = 10_000
ROWS = 2_000  # rows of a block compared with the radii at a time
# How TensorFlow sums half-precision numbers on a CPU: at most LEAF at once, in LANES lanes and ACCUMULATORS sums.
LANES, ACCUMULATORS, LEAF = 8, 4, 1_600


def precision_recall(reference_features: Features, sample_features: Features, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), as ADM's `evaluator.py` prints them.

    An image's neighbourhood reaches to its k-th nearest neighbour in its own set. Precision is the share of samples
    in the neighbourhood of some reference image; recall is the share of reference images in the neighbourhood of
    some sample.

    The numbers that papers quote come from distances in half precision, which ADM uses wherever none of them
    overflows. Half precision rounds to about a thousandth of a number, so this function computes in the same
    arithmetic and in TensorFlow's order of summation on a CPU; exact distances would give other shares.

    Args:
        reference_features (`np.ndarray` or `torch.Tensor` of shape `(n, d)`): Features of the reference images.
        sample_features (`np.ndarray` or `torch.Tensor` of shape `(m, d)`): Features of the images to judge.
        k (`int`, *optional*, defaults to 3): The neighbour that sets the size of a neighbourhood.

    Returns:
        `tuple[float, float]`: Precision and recall, in [0, 1]. Memory holds at most 10,000 x 10,000 distances.

    Raises:
        ValueError: If there are not more than `k` features, if they are not finite, or if their widths differ.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf.evaluation import precision_recall

    >>> features = torch.randn(100, 8)
    >>> precision_recall(features, features)
    (1.0, 1.0)
    ```
    """
    if not is_count(k):
        raise ValueError(f"`k` is {k}; expected an integer of at least 1.")
    reference = as_features(reference_features, "reference features", k + 1).float()
    samples = as_features(sample_features, "sample features", k + 1).float()
    check_same_width(reference.shape[1], samples.shape[1])
    reference_radii, sample_radii = _radii(reference, k), _radii(samples, k)
    is_precise = torch.zeros(len(samples), dtype=torch.bool)
    is_recalled = torch.zeros(len(reference), dtype=torch.bool)
    for i, rows in _blocks(reference):
        for j, columns in _blocks(samples):
            distances = _distances(rows, columns)
            for part in range(0, len(rows), ROWS):
                near = distances[part : part + ROWS]
                here = slice(i + part, i + part + len(near))
                is_recalled[here] |= (near <= sample_radii[j : j + len(columns)]).any(1)
                is_precise[j : j + len(columns)] |= (near <= reference_radii[here, None]).any(0)
    return is_precise.double().mean().item(), is_recalled.double().mean().item()


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance `(n,)` from each feature to its k-th nearest neighbour, not counting itself."""
    radii = torch.empty(len(features))
    for i, rows in _blocks(features):
        nearest = torch.empty(len(rows), 0)
        for _, columns in _blocks(features):
            found = _distances(rows, columns)
            found = found.topk(min(k + 1, found.shape[1]), dim=1, largest=False).values
            nearest = torch.cat([nearest, found], dim=1).sort(dim=1).values[:, : k + 1]
        radii[i : i + len(rows)] = nearest[:, k]
    return radii


def _blocks(features: torch.Tensor):
    return [(start, features[start : start + BLOCK]) for start in range(0, len(features), BLOCK)]


def _distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Squared distances `(n, m)` between float32 features, in half precision unless one of them overflows."""
    distances = _squares_and_products(rows.half(), columns.half(), _half_sums)
    if distances.isfinite().all():
        return distances.float()
    return _squares_and_products(rows, columns, lambda squares: squares.sum(1))


def _squares_and_products(rows: torch.Tensor, columns: torch.Tensor, add_up) -> torch.Tensor:
    # Every operation rounds to the dtype of the features, except sums of products: TensorFlow keeps them in float32.
    if min(len(rows), len(columns)) > 1:
        products = rows.float() @ columns.float().T
    else:  # repeated, because a matrix-vector product rounds differently from a product of two matrices
        products = rows.float().repeat(2, 1) @ columns.float().repeat(2, 1).T
        products = products[: len(rows), : len(columns)]
    products = products.to(rows.dtype)
    distances = products.mul_(-2).add_(add_up(rows * rows)[:, None]).add_(add_up(columns * columns))
    return distances.clamp_(min=0)


def _half_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums `(n,)` of the rows of half-precision values `(n, d)`, rounded as TensorFlow rounds them on a CPU.

    TensorFlow halves rows longer than `LEAF`; sums vectors of `LANES` neighbours in `ACCUMULATORS` accumulators, then
    the leftover vectors; sums the lanes in float32; and adds the values that do not fill a vector last.
    """
    width = values.shape[1]
    if width > LEAF:
        half = math.ceil(math.ceil(width / 2) / LANES) * LANES
        return _half_sums(values[:, :half]) + _half_sums(values[:, half:])
    num_vectors = width // LANES
    vectors, rest = values[:, : num_vectors * LANES].unflatten(1, (-1, LANES)), values[:, num_vectors * LANES :]
    num_rounds = num_vectors // ACCUMULATORS
    sums = values.new_zeros(len(values), ACCUMULATORS, LANES)
    for i in range(num_rounds):
        sums = sums + vectors[:, i * ACCUMULATORS : (i + 1) * ACCUMULATORS]
    total = sums[:, 0]
    for vector in [*sums.unbind(1)[1:], *vectors[:, num_rounds * ACCUMULATORS :].unbind(1)]:
        total = total + vector
    remainder = values.new_zeros(len(values))
    for column in rest.unbind(1):
        remainder = remainder + column
    return remainder + total.float().sum(1).half()
