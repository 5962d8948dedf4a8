"""PNG files that hold the parameters with which their images were generated."""

import json
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .files import replacing


# The text chunk in which image tools store generation parameters.
KEY = "parameters"


def write_png(image: Image.Image, file: BinaryIO | Path, parameters: dict) -> None:
    """Write `image` to a file, with `parameters` as JSON in its text chunk "parameters".

    Args:
        image (`PIL.Image.Image`): The image.
        file (binary file or `Path`): An open file, or a path.
        parameters (`dict`): Plain JSON.
    """
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(parameters, ensure_ascii=False))
    image.save(file, format="PNG", pnginfo=info)


def save_png(image: Image.Image, path: str | Path, parameters: dict) -> None:
    """Write `image` to `path`, whole or not at all, with `parameters` as JSON in its text chunk "parameters".

    Args:
        image (`PIL.Image.Image`): The image.
        path (`str` or `os.PathLike`): The file, replaced if it exists.
        parameters (`dict`): Plain JSON.

    Raises:
        ValueError: If the file can't be written.
    """
    try:
        with replacing(path) as partial:
            write_png(image, partial, parameters)
    except OSError as error:
        raise ValueError(f"The image {str(path)!r} can't be written: {error.strerror or error}.") from error


def read_parameters(path: str | Path) -> dict:
    """Read the parameters that [`save_png`] stored.

    Args:
        path (`str` or `os.PathLike`): The file.

    Raises:
        ValueError: If it is not an image, or holds no parameters of this package.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
    except Exception as error:  # Pillow's readers have no error in common
        raise ValueError(f"The image {str(path)!r} can't be read: {error}.") from error
    try:
        parameters = json.loads(text or "")
    except ValueError:  # other programs store plain text in the same chunk
        parameters = None
    if not isinstance(parameters, dict):
        raise ValueError(f"The image {str(path)!r} holds no parameters of llamagen.")
    return parameters


def in_common(parameters: list[dict]) -> dict:
    """The parameters of several images in one grid: what they have in common, and their `seeds`."""
    if len(parameters) == 1:
        return parameters[0]
    common = {
        name: value for name, value in parameters[0].items() if all(other.get(name) == value for other in parameters)
    }
    return common | {"seeds": [each["seed"] for each in parameters]}
