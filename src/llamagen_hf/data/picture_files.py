"""Pictures of a dataset, opened."""

from io import BytesIO
from pathlib import Path

from datasets.utils.file_utils import xopen
from PIL import Image

from ..images.reading import UnreadableImage, read_image
from .bad_rows import BadRow


def decode_picture(value: dict | Image.Image | None, min_size: int = 0) -> Image.Image:
    """Open a picture of a dataset, as by [`~llamagen_hf.images.reading.read_image`].

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
        if not isinstance(value, dict):
            image = read_image(value)
        elif value["bytes"] is not None:
            image = read_image(BytesIO(value["bytes"]))
        else:
            with xopen(value["path"], "rb") as file:  # which may be in an archive, or elsewhere
                image = read_image(file)
    except UnreadableImage as error:
        raise BadRow(f"picture can't be decoded: {error.reason}") from error
    except FileNotFoundError as error:
        raise BadRow(f"no picture: there is no file {Path(value['path']).name}") from error
    except Exception as error:  # of whatever file system it is on
        raise BadRow(f"picture can't be decoded: {error}") from error
    if min(image.size) < min_size:
        size = f"{image.width}x{image.height} pixels"
        raise BadRow(f"picture too small: it is {size}, the shorter side must be at least {min_size}")
    return image
