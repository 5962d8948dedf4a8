"""Pictures decoded, cropped and turned into tensors."""

import math
import random

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .bad_rows import BadRow


def decode_picture(value: dict | Image.Image | None, min_size: int = 0) -> Image.Image:
    """Open a picture of a dataset: upright, and RGB as by [`to_rgb`].

    Args:
        value (`dict`, `PIL.Image.Image` or `None`): What a column of type `datasets.Image(decode=False)` holds, the
            file's `bytes` or its `path`; or a picture that is open already.
        min_size (`int`, *optional*, defaults to 0): What the shorter side must measure at least, in pixels.

    Raises:
        BadRow: If there is no picture, if it can't be decoded to the end, or if it is too small.
    """
    if value is None or (isinstance(value, dict) and value["bytes"] is None and value["path"] is None):
        raise BadRow("no picture")
    try:
        if isinstance(value, dict):
            image = datasets.Image().decode_example(value)  # also turns it upright
        else:
            image = ImageOps.exif_transpose(value)
        image = to_rgb(image)
    except FileNotFoundError as error:
        raise BadRow(f"no picture: there is no file {value['path']}") from error
    except UnidentifiedImageError as error:
        raise BadRow("picture can't be decoded: no known format") from error
    except Exception as error:  # Pillow's readers have no error in common
        raise BadRow(f"picture can't be decoded: {error}") from error
    if min(image.size) < min_size:
        size = f"{image.width}x{image.height} pixels"
        raise BadRow(f"picture too small: it is {size}, the shorter side must be at least {min_size}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB picture of 8 bits a channel; what is transparent is put on white."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip rather than scale
        values = np.clip(np.asarray(image), 0, 65535) / 257
        image = Image.fromarray(np.round(values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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
    image = scale_shorter_side(image, size)
    return _window(image, size, (image.width - size) // 2, (image.height - size) // 2)


def random_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A random square at a random scale, as the released tokenizer was trained on (`random_crop_arr` of ADM).

    The shorter side is drawn uniformly from `size` to `size / 0.8`, rounded up, then the place of the square.
    """
    return _random_window(scale_shorter_side(image, rng.randint(size, math.ceil(size / 0.8))), size, rng)


def shifted_crop(image: Image.Image, size: int, crop_range: float, rng: random.Random) -> Image.Image:
    """A random square of side `size` out of the centre crop of side `crop_range * size`."""
    return _random_window(center_crop(image, round(size * crop_range)), size, rng)


def ten_crop(image: Image.Image, size: int, crop_range: float) -> list[Image.Image]:
    """Ten squares of side `size` out of the centre crop of side `crop_range * size`, rounded down.

    Top left, top right, bottom left, bottom right and centre, then the same five of the mirrored picture: the order
    and the rounding of torchvision's `TenCrop`, which the released codes of ImageNet were made with.
    """
    image = center_crop(image, int(size * crop_range))
    far = image.width - size
    middle = round(far / 2)
    places = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]
    return [_window(side, size, *place) for side in (image, ImageOps.mirror(image)) for place in places]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A picture as a `(3, height, width)` float tensor in [-1, 1]; RGB as by [`to_rgb`]."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).float() / 127.5 - 1


def _window(image: Image.Image, size: int, left: int, top: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _random_window(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    top = rng.randrange(image.height - size + 1)
    return _window(image, size, rng.randrange(image.width - size + 1), top)
