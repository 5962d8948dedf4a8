"""Pictures that people bring: opened with limits, refused in words."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image


MAX_MEGAPIXELS = 64
REFUSAL = "it is no picture that can be read; PNG, JPEG, WebP, GIF, BMP and TIFF can."


def open_picture(file: str | Path | BinaryIO, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """Read a picture to its end; of an animation the first frame.

    Args:
        file (`str`, `os.PathLike` or a binary file): Where it is.
        max_megapixels (`float`, *optional*, defaults to 64): Its size at the most, looked at before it is decoded.

    Returns:
        `PIL.Image.Image`: The picture in its own mode and orientation.

    Raises:
        ValueError: In one sentence, if it is none, is damaged or too large.
    """
    name = f"The picture {str(file)!r}" if isinstance(file, (str, Path)) else "The picture"
    try:
        with Image.open(file) as picture:
            megapixels = picture.width * picture.height / 1e6
            if megapixels > max_megapixels:
                raise ValueError(
                    f"{name} is too large: it has {megapixels:.0f} megapixels, at most {max_megapixels:g} are taken."
                )
            picture.load()
            return picture.copy()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: at most {max_megapixels:g} megapixels are taken.") from error
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist.") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers have no error in common
        raise ValueError(f"{name} can't be read: {REFUSAL}") from error
