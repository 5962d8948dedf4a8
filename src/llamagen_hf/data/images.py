"""Images of a dataset: opened, and as tensors."""

import random
from io import BytesIO
from pathlib import Path

import torch
from datasets.utils.file_utils import xopen
from PIL import Image

from ..images.reading import UnreadableImage, read_image
from ..images.transforms import center_crop, random_crop, to_tensor
from .bad_rows import BadRow
from .source import DataConfig


def decode_image(value: dict | Image.Image | None, min_size: int = 0) -> Image.Image:
    """Open an image of a dataset, as by [`~llamagen_hf.images.reading.read_image`].

    Args:
        value (`dict`, `PIL.Image.Image` or `None`): What a column of type `datasets.Image(decode=False)` holds, the
            file's `bytes` or its `path`; or an image that is open already.
        min_size (`int`, *optional*, defaults to 0): What the shorter side must measure at least, in pixels.

    Raises:
        BadRow: If there is no image, if it can't be decoded to the end, or if it is too small.
    """
    if value is None or (isinstance(value, dict) and value["bytes"] is None and value["path"] is None):
        raise BadRow("no image")
    try:
        if not isinstance(value, dict):
            image = read_image(value)
        elif value["bytes"] is not None:
            image = read_image(BytesIO(value["bytes"]))
        else:
            with xopen(value["path"], "rb") as file:  # which may be in an archive, or elsewhere
                image = read_image(file)
    except UnreadableImage as error:
        raise BadRow(f"image can't be decoded: {error.reason}") from error
    except FileNotFoundError as error:
        raise BadRow(f"no image: there is no file {Path(value['path']).name}") from error
    except Exception as error:  # of whatever file system it is on
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
