"""Best of n: several images for the same image, ranked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image


# Images and the prompts (or class names) that they were drawn for to a score each; higher is better.
Scorer = Callable[[list[Image.Image], list[str | None]], Sequence[float]]


@dataclass
class Candidate:
    """One of several images drawn for the same image.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): The image, in the output type of the drawing.
        score (`float`): The scorer's; higher is better.
        codes (`torch.LongTensor` of shape `(grid_size, grid_size)`): Its codes.
        parameters (`dict`): What made it, as in [`~llamagen_hf.llamagen.pipeline_output.AutoregressiveImageOutput`].
    """

    image: Any
    score: float
    codes: torch.LongTensor
    parameters: dict


def score_images(scorer: Scorer, images: list[Image.Image], prompts: list[str | None]) -> list[float]:
    """The scores of images.

    Raises:
        ValueError: If the scorer does not give a finite number for each image.
    """
    scores = torch.as_tensor(scorer(images, prompts)).flatten()
    if len(scores) != len(images) or not scores.isfinite().all():
        raise ValueError(f"`scorer` must give a finite number for each of {len(images)} images; it gave {scores}.")
    return scores.tolist()
