"""Best of n: several candidates for the same image, ranked by a score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .arguments import FieldError, is_count


# From images and the prompts (or class names) they were generated for to one score each; higher is better.
Scorer = Callable[[list[Image.Image], list[str | None]], Sequence[float]]


@dataclass
class Candidate:
    """One of several candidates for the same image.

    Args:
        image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): The image, in the output type of the call.
        score (`float`): The scorer's; higher is better.
        parameters (`dict`): What it was generated from, as in the output of the pipeline.
        codes (`torch.LongTensor` of shape `(grid_size, grid_size)`, *optional*): Its codes, if it has any.
    """

    image: Any
    score: float
    parameters: dict
    codes: torch.LongTensor | None = None


def check_candidates(num_candidates, scorer: Scorer | None, needs_scorer: bool = True) -> None:
    """Check `num_candidates` and the `scorer` to choose by.

    Args:
        num_candidates (`int`): Candidates for an image.
        scorer (`Callable`, *optional*): Scores them.
        needs_scorer (`bool`, *optional*, defaults to `True`): Whether nothing else could choose.

    Raises:
        FieldError: If `num_candidates` is no count, or nothing can choose among them.
    """
    if not is_count(num_candidates):
        raise FieldError("num_candidates", f"`num_candidates` is {num_candidates}; expected an integer of at least 1.")
    if num_candidates > 1 and not callable(scorer) and (needs_scorer or scorer is not None):
        raise FieldError(
            "scorer", "`num_candidates` needs a `scorer` to choose by, such as llamagen_hf.clip.CLIPScorer."
        )


def score_images(scorer: Scorer, images: list[Image.Image], prompts: list[str | None]) -> list[float]:
    """The scores of images, each with its prompt or class name.

    Raises:
        ValueError: If the scorer does not return a finite number for each image.
    """
    scores = torch.as_tensor(scorer(images, prompts)).flatten()
    if len(scores) != len(images) or not scores.isfinite().all():
        raise ValueError(f"`scorer` must give a finite number for each of {len(images)} images; it gave {scores}.")
    return scores.tolist()


def rank_candidates(scores: Sequence[float], num_candidates: int) -> list[list[int]]:
    """Rank the candidates of each image.

    Args:
        scores (`Sequence[float]`): The score of every candidate; those of one image stand together.
        num_candidates (`int`): Candidates per image.

    Returns:
        `list[list[int]]`: For each image the positions of its candidates in `scores`, best first. Candidates of equal
        score keep their order.

    Raises:
        ValueError: If the scores do not divide into groups of `num_candidates`.
    """
    if num_candidates < 1 or len(scores) % num_candidates:
        raise ValueError(f"{len(scores)} scores can't be divided into groups of {num_candidates} candidates.")
    return [
        sorted(range(first, first + num_candidates), key=lambda i: scores[i], reverse=True)
        for first in range(0, len(scores), num_candidates)
    ]
