"""OpenAI's masks, as far as a model that draws rows of codes from the top to the bottom can honour them."""

import io

import numpy as np
from PIL import Image, ImageOps

from ...arguments import FieldError


def read_mask(file: bytes, size: tuple[int, int]) -> np.ndarray:
    """Where a mask is fully transparent, so that its image is to be generated anew.

    Args:
        file (`bytes`): The mask.
        size (`tuple[int, int]`): Width and height of its image, upright.

    Returns:
        `numpy.ndarray` of shape `(height, width)`: `True` where it is transparent.

    Raises:
        FieldError: If the mask can't be read, or has another size.
    """
    try:
        with Image.open(io.BytesIO(file)) as image:
            # Checked before decoding: a mask may be as large as its image, but no larger.
            if size not in (image.size, image.size[::-1]):
                raise FieldError(
                    "mask",
                    f"`mask` is {image.width}x{image.height} and `image` {size[0]}x{size[1]} pixels; "
                    "expected the same.",
                )
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    except FieldError:
        raise
    except Exception as error:  # Pillow's readers have no error in common
        raise FieldError("mask", "`mask` can't be read as an image; expected a PNG.") from error
    if alpha.size != size:
        raise FieldError("mask", "`mask` and `image` lie on different sides; expected the same width and height.")
    return np.asarray(alpha) == 0


def find_lower_band(clear: np.ndarray) -> int | None:
    """The first row of the transparent region, if it is everything from there down and does not start at the top."""
    rows = clear.all(axis=1)
    top = len(rows) - int(rows.sum())
    return top if 0 < top < len(rows) and not clear[:top].any() else None


def count_kept_rows(top: int, size: tuple[int, int], grid_size: int) -> int:
    """Rows of codes that lie wholly above a lower band of an image.

    Args:
        top (`int`): The first row of pixels of the band.
        size (`tuple[int, int]`): Width and height of the image, of which the model sees the middle square.
        grid_size (`int`): Rows of codes in that square.

    Returns:
        `int`: From 0 to `grid_size`, which means that the band lies below the square.
    """
    side, height = min(size), size[1]
    # Everything twice, since the square may begin at half a row.
    return min(max((2 * top - height + side) * grid_size // (2 * side), 0), grid_size)


def rows_to_keep(mask: bytes | None, upload: bytes, size: tuple[int, int], grid_size: int) -> int:
    """Rows of codes that an edit keeps if the request does not say how many.

    Without a mask, the image's own transparency is the mask if it is a lower band; else the upper half is kept.

    Args:
        mask (`bytes`, *optional*): The file of the mask.
        upload (`bytes`): The file of the image, which can be read.
        size (`tuple[int, int]`): Its width and height, upright.
        grid_size (`int`): Rows of codes of the checkpoint.

    Raises:
        FieldError: If the mask can't be read, or marks a region that can't be generated.
    """
    if mask is None:
        try:
            top = find_lower_band(read_mask(upload, size))
        except FieldError:  # its EXIF orientation is broken
            top = None
        return grid_size // 2 if top is None else min(count_kept_rows(top, size, grid_size), grid_size - 1)
    clear = read_mask(mask, size)
    if not clear.any():
        raise FieldError("mask", "`mask` has no transparent pixel, so there is nothing to generate.")
    top = 0 if clear.all() else find_lower_band(clear)
    if top is None:
        raise FieldError(
            "mask",
            "`mask` must be transparent over the full width, from some row down to the bottom, and nowhere else: this "
            "model draws from the top to the bottom and can't redraw another region.",
        )
    kept = count_kept_rows(top, size, grid_size)
    if kept == grid_size:
        raise FieldError(
            "mask",
            "`mask` is transparent only outside of the image's middle square; the model sees no more than that.",
        )
    return kept
