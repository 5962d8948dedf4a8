"""The Inception Score (arXiv 1606.03498), over splits as ADM computes it."""

import numpy as np
import torch

from .features import as_features


def inception_score(logits: np.ndarray | torch.Tensor, split_size: int = 5000) -> float:
    """How confident a classifier is of each image, and how varied it finds them all.

    exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498), for each `split_size` images in the given
    order, the last split holding what is left; then the mean over splits, as in ADM's `evaluator.py`. There the logits
    are those of Inception without its bias, 1008 of them.

    Args:
        logits (`np.ndarray` or `torch.Tensor` of shape `(n, classes)`): A classifier's logits.
        split_size (`int`, *optional*, defaults to 5000): Images of a split.

    Returns:
        `float`: From 1 to the number of classes.

    Raises:
        ValueError: In one sentence, if the logits are no finite numbers of that shape, or `split_size` is no count.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf.evaluation import inception_score

    >>> round(inception_score(100 * torch.eye(10)), 3)
    10.0
    ```
    """
    if not isinstance(split_size, int) or isinstance(split_size, bool) or split_size < 1:
        raise ValueError(f"`split_size` is {split_size}; expected an integer of at least 1.")
    log_shares = as_features(logits, "logits", 1).double().log_softmax(1)
    scores = []
    for part in log_shares.split(split_size):
        marginal = part.logsumexp(0) - np.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()
