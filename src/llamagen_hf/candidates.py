"""Best of n: several pictures for the same image, ranked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image


# Pictures and the prompts (or class names) that they were drawn for to a score each; higher is better.
Scorer = Callable[[list[Image.Image], list[str | None]], Sequence[float]]


@dataclass
class Candidate:
    """One of several pictures drawn for the same image.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): The picture, in the output type of the drawing.
        score (`float`): The scorer's; higher is better.
        codes (`torch.LongTensor` of shape `(grid_size, grid_size)`): Its codes.
        parameters (`dict`): What made it, as in [`~llamagen_hf.outputs.AutoregressiveImageOutput`].
    """

    image: Any
    score: float
    codes: torch.LongTensor
    parameters: dict


def score_pictures(scorer: Scorer, pictures: list[Image.Image], prompts: list[str | None]) -> list[float]:
    """The scores of pictures.

    Raises:
        ValueError: If the scorer does not give a finite number for each picture.
    """
    scores = torch.as_tensor(scorer(pictures, prompts)).flatten()
    if len(scores) != len(pictures) or not scores.isfinite().all():
        raise ValueError(f"`scorer` must give a finite number for each of {len(pictures)} pictures; it gave {scores}.")
    return scores.tolist()
