"""Rows of a dataset as samples: their images, and the rows that can't be used."""

import logging
import random
from collections import Counter
from io import BytesIO
from pathlib import Path

import torch
from datasets.utils.file_utils import xopen
from PIL import Image

from ..images.reading import UnreadableImage, read_image
from ..images.transforms import center_crop, random_crop, to_tensor
from .source import DataConfig


logger = logging.getLogger(__name__)


class BadRow(ValueError):
    """A row that can't be used. The message says why: the kind of fault and, after a colon, its details."""


class BadRows:
    """Counts the rows of a run that can't be used, each once. It is a part of a run's checkpoints.

    Args:
        limit (`int`): How many such rows are allowed. Each process counts the rows that it reads.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.reasons: dict[tuple[str, int | str], str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, index: int | str, reason: str, split: str = "train") -> None:
        """Count row `index` of `split`, and log it the first time.

        Raises:
            ValueError: If there are now more than `limit`.
        """
        if (split, index) in self.reasons:
            return
        self.reasons[split, index] = reason
        place = f"row {index}" if split == "train" else f"row {index} of {split}"
        logger.warning("Can't use %s: %s.", place, reason)
        if len(self) > self.limit:
            raise ValueError(
                f"{len(self)} row(s) can't be used, more than max_bad_rows ({self.limit}) allows; "
                f"the last: {place}: {reason}."
            )

    def report(self) -> dict[str, int]:
        """The number of rows with each kind of fault, the most frequent first."""
        return dict(Counter(reason.partition(":")[0] for reason in self.reasons.values()).most_common())

    def state_dict(self) -> dict[str, list]:
        """The rows so far, for a checkpoint."""
        return {"rows": [(split, index, reason) for (split, index), reason in self.reasons.items()]}

    def load_state_dict(self, state: dict[str, list]) -> None:
        """Go on from the rows of a checkpoint."""
        self.reasons = {(split, index): reason for split, index, reason in state["rows"]}


def decode_image(value: dict | Image.Image | None, min_size: int = 0) -> Image.Image:
    """Open an image of a dataset, see [`~llamagen_hf.images.reading.read_image`].

    Args:
        value (`dict`, `PIL.Image.Image` or `None`): A value of a column of type `datasets.Image(decode=False)`, with
            the file's `bytes` or its `path`; or an open image.
        min_size (`int`, *optional*, defaults to 0): Lowest length of the shorter side, in pixels.

    Returns:
        `PIL.Image.Image`: In mode RGB.

    Raises:
        BadRow: If there is no image, if it can't be decoded to its end, or if it is too small.
    """
    if value is None or (isinstance(value, dict) and value["bytes"] is None and value["path"] is None):
        raise BadRow("no image")
    try:
        if not isinstance(value, dict):
            image = read_image(value)
        elif value["bytes"] is not None:
            image = read_image(BytesIO(value["bytes"]))
        else:
            with xopen(value["path"], "rb") as file:  # which may be in an archive, or remote
                image = read_image(file)
    except UnreadableImage as error:
        raise BadRow(f"image can't be decoded: {error.reason}") from error
    except FileNotFoundError as error:
        raise BadRow(f"no image: there is no file {Path(value['path']).name}") from error
    except Exception as error:  # file systems have no error in common
        raise BadRow(f"image can't be decoded: {error}") from error
    if min(image.size) < min_size:
        size = f"{image.width}x{image.height} pixels"
        raise BadRow(f"image too small: it is {size}, the shorter side must be at least {min_size}")
    return image


class ImageSamples:
    """Turns a row into a square image.

    Args:
        data ([`DataConfig`]): Column and size of the images.
        crop (`str`, *optional*, defaults to `"center"`): `"center"` or `"random"`.
        flip (`bool`, *optional*, defaults to `False`): Mirror half of the images.
    """

    def __init__(self, data: DataConfig, crop: str = "center", flip: bool = False):
        if crop not in ("center", "random"):
            raise ValueError(f"crop is {crop!r}; expected 'center' or 'random'.")
        self.data = data
        self.crop = crop
        self.flip = flip

    def __call__(self, row: dict, rng: random.Random) -> dict[str, torch.Tensor]:
        """`images`: `(3, image_size, image_size)` in [-1, 1].

        Raises:
            BadRow: If there is no usable image.
        """
        image = decode_image(row[self.data.image_column], self.data.min_image_size)
        size = self.data.image_size
        image = center_crop(image, size) if self.crop == "center" else random_crop(image, size, rng)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"images": to_tensor(image)}


def stack_images(samples: list[dict]) -> dict[str, torch.Tensor]:
    """`images` as one tensor `(batch, 3, image_size, image_size)`."""
    return {"images": torch.stack([sample["images"] for sample in samples])}
