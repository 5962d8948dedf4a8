"""Pictures of a dataset, opened."""

from pathlib import Path

import datasets
from PIL import Image, ImageOps, UnidentifiedImageError

from .bad_rows import BadRow
from .transforms import to_rgb


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
        raise BadRow(f"no picture: there is no file {Path(value['path']).name}") from error
    except UnidentifiedImageError as error:
        raise BadRow("picture can't be decoded: no known format") from error
    except Exception as error:  # Pillow's readers have no error in common
        raise BadRow(f"picture can't be decoded: {error}") from error
    if min(image.size) < min_size:
        size = f"{image.width}x{image.height} pixels"
        raise BadRow(f"picture too small: it is {size}, the shorter side must be at least {min_size}")
    return image
