"""Crops of images, and images as tensors."""

import math
import random

import numpy as np
import torch
from PIL import Image, ImageOps

from .reading import read_image


def scale_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """Scale to a shorter side of `size`: halve with a box filter while at least twice as large, then bicubically.

    That is how ADM keeps fine detail from turning into aliases (`image_datasets.py` of openai/guided-diffusion).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of side `size` after [`scale_shorter_side`] (`center_crop_arr` of ADM)."""
    short = min(image.size)
    if max(image.size) > 8 * short:  # scaling a whole strip would take gigabytes
        width, height = (min(side, 4 * short) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    image = scale_shorter_side(image, size)
    return _window(image, size, (image.width - size) // 2, (image.height - size) // 2)


def random_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A random square at a random scale, as the released tokenizer was trained on (`random_crop_arr` of ADM).

    First the shorter side is drawn uniformly from `size` to `size / 0.8`, rounded up, then the place of the square.
    """
    return _random_window(scale_shorter_side(image, rng.randint(size, math.ceil(size / 0.8))), size, rng)


def shifted_crop(image: Image.Image, size: int, crop_range: float, rng: random.Random) -> Image.Image:
    """A random square of side `size` within the centre crop of side `crop_range * size`."""
    return _random_window(center_crop(image, round(size * crop_range)), size, rng)


def ten_crop(image: Image.Image, size: int, crop_range: float) -> list[Image.Image]:
    """Ten squares of side `size` within the centre crop of side `crop_range * size`, rounded down.

    Top left, top right, bottom left, bottom right and centre, then the same five of the mirrored image: the order
    and the rounding of torchvision's `TenCrop`, which the released codes of ImageNet were made with.
    """
    image = center_crop(image, int(size * crop_range))
    far = image.width - size
    middle = round(far / 2)
    places = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]
    return [_window(side, size, *place) for side in (image, ImageOps.mirror(image)) for place in places]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image as a `(3, height, width)` float tensor in [-1, 1]."""
    return torch.from_numpy(np.array(read_image(image))).permute(2, 0, 1).float() / 127.5 - 1


def _window(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _random_window(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    top = rng.randrange(image.height - size + 1)
    return _window(image, size, rng.randrange(image.width - size + 1), top)
