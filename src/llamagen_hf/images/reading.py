"""The reader of images for the whole package: any file becomes 8-bit sRGB, upright and on white."""

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError


try:
    import pillow_heif
except ImportError:  # only photos of phones need it
    pass
else:
    pillow_heif.register_heif_opener()

SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff .avif .avifs .heic .heif .hif .jp2 .j2k .jpx "
    ".ppm .pgm .pbm .pnm .pfm .tga .pcx .sgi .psd .qoi .ico .dds".split()
)
# What file managers, network storage and archivers leave in folders, besides names that begin with a dot.
FOREIGN_FOLDERS = ("@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
UPLOAD_MEGAPIXELS = 64  # largest image that a server accepts
# Format and reader of the HEIF family, by the bytes after the first four.
BRANDS = dict.fromkeys((b"ftypavif", b"ftypavis"), ("AVIF", "Pillow 11.3 or newer"))
BRANDS |= dict.fromkeys(
    (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftyphevc", b"ftypmif1", b"ftypmsf1"),
    ("HEIC", "the package pillow-heif"),
)
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
GREY_MODES = ("1", "L", "LA", "La")

Source = str | Path | BinaryIO | Image.Image | np.ndarray | torch.Tensor


class UnreadableImage(ValueError):
    """An image that can't be read. The message is a sentence; `reason` is the part of it that says why."""

    def __init__(self, sentence: str, reason: str):
        super().__init__(sentence)
        self.reason = reason


def read_image(source: Source, name: str | None = None, max_megapixels: float | None = None) -> Image.Image:
    """Read an image to its end: the same pixels for every part of the package.

    - It is turned upright by its EXIF orientation; broken EXIF data are ignored.
    - Colours with an ICC profile become sRGB; a profile that is broken or for another kind of image is ignored.
    - Transparent parts are put on white.
    - 16-bit values are scaled to 8 bits. 32-bit values have no fixed range: the scale is the first of 0..1 (floats
      only), 0..255 and 0..65535 that holds all of them.
    - Only the first frame of an animation, or the first page, is read.

    Args:
        source: A path, a binary file, a PIL image, an array `(height, width)` or `(height, width, 1 to 4)`, or a
            tensor `(height, width)` or `(1 to 4, height, width)`.
        name (`str`, *optional*): Name of the image in errors; by default the path.
        max_megapixels (`float`, *optional*): Largest size, checked before the image is decoded; by default Pillow's
            limit for files, twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Returns:
        `PIL.Image.Image`: A new image of mode RGB, without metadata.

    Raises:
        UnreadableImage: If it is not an image, or is damaged or too large.
    """
    if name is None and isinstance(source, (str, Path)):
        name = str(source)
    subject = "The image" if name is None else f"The image {name!r}"
    try:
        if isinstance(source, (np.ndarray, torch.Tensor)):
            source = _from_array(source)
        if isinstance(source, Image.Image):
            _check_size(source, max_megapixels)
            return _to_rgb(source)
        with Image.open(source) as image:
            _check_size(image, max_megapixels)
            return _to_rgb(image)
    except _TooLarge as error:
        raise UnreadableImage(f"{subject} is too large: {error}.", f"too large, {error}") from error
    except Image.DecompressionBombError as error:
        reason = f"at most {max_megapixels or 2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels are taken"
        raise UnreadableImage(f"{subject} is too large: {reason}.", f"too large, {reason}") from error
    except FileNotFoundError as error:
        raise UnreadableImage(f"{subject} does not exist.", "there is no such file") from error
    except UnidentifiedImageError as error:
        said, reason = _unknown_format(source)
        raise UnreadableImage(f"{subject} can't be read: {said}.", reason) from error
    except Exception as error:  # Pillow's readers have no error in common
        # `strerror` leaves out the path, which the sentence has already.
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".") or type(error).__name__
        said = reason if isinstance(error, _Reason) else f"it is damaged ({reason})"
        raise UnreadableImage(f"{subject} can't be read: {said}.", reason) from error


class _Reason(ValueError):
    """A reason of our own why an image can't be read."""


class _TooLarge(_Reason):
    pass


def _check_size(image: Image.Image, max_megapixels: float | None) -> None:
    megapixels = image.width * image.height / 1e6
    if not megapixels:
        raise _Reason("it has no pixels")
    if max_megapixels is not None and megapixels > max_megapixels:
        raise _TooLarge(f"it has {megapixels:.0f} megapixels, at most {max_megapixels:g} are taken")


def _unknown_format(source) -> tuple[str, str]:
    """Why a file that Pillow does not know can't be read, in full and in short."""
    try:
        if isinstance(source, (str, Path)):
            with open(source, "rb") as file:
                start = file.read(12)
        else:
            source.seek(0)
            start = source.read(12)
    except OSError:
        start = b""
    if start[4:] in BRANDS:
        format, reader = BRANDS[start[4:]]
        said = f"it is {format}, which needs {reader}"
        return said, said
    return "it is not in a known format, such as PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF", "no known format"


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    shape = tuple(array.shape)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and not 1 <= array.shape[2] <= 4):
        raise _Reason(f"it has the shape {shape}; expected rows, columns and up to 4 channels")
    if 0 in shape:
        raise _Reason("it has no pixels")
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype != np.uint8:
        array = _to_8_bits(array, 65535 if array.dtype == np.uint16 else None)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def _to_8_bits(values: np.ndarray, highest: int | None = None) -> np.ndarray:
    """Values scaled from 0..highest to uint8; by default from the first usual range that holds them."""
    if highest is None:
        low, high = float(values.min()), float(values.max())
        is_float = values.dtype.kind == "f"
        slack = 0.1 if is_float else 0  # resizing overshoots the ends of the range
        ranges = (1, 255, 65535) if is_float else (255, 65535)
        highest = next((end for end in ranges if high <= (1 + slack) * end), None)
        if highest is None or not low >= -slack * highest:
            raise _Reason(f"its values go from {low:g} to {high:g}; expected 0 to 1, to 255 or to 65535")
    return np.round(np.clip(values, 0, highest) * (255 / highest)).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    transposition, profile = _transposition(image), image.info.get("icc_profile")
    if image.mode[0] in "IF":  # more than 8 bits, which Pillow would clip rather than scale
        image = _deep_to_8_bits(image)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in GREY_MODES else "RGBA")
        alpha = image.getchannel("A")
    mode = "L" if image.mode in GREY_MODES else image.mode if image.mode in ("CMYK", "LAB") else "RGB"
    image = image.convert(mode)
    transform = _to_srgb(profile, mode)
    image = image.convert("RGB") if transform is None else ImageCms.applyTransform(image, transform)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if transposition is not None:
        image = image.transpose(transposition)
    image.info = {}  # a profile or an orientation must not be applied twice
    return image


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """The transposition that turns an image upright."""
    try:
        return TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken data raise all kinds of errors in Pillow
        return None


def _deep_to_8_bits(image: Image.Image) -> Image.Image:
    values, transparent = np.asarray(image), image.info.get("transparency")
    # Pillow 10 opens 16-bit PNG, and all of them 16-bit PGM, as 32-bit values.
    has_16_bits = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    has_16_bits = has_16_bits and image.mode != "F"
    result = Image.fromarray(_to_8_bits(values, 65535 if has_16_bits else None))
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from an image of `mode` to sRGB; `None` if Pillow's plain conversion suffices."""
    try:
        if mode == "LAB":  # its values need no profile, and Pillow's plain conversion does not know them
            source = ImageCms.createProfile("LAB")
        elif profile:
            source = ImageCms.getOpenProfile(BytesIO(profile))
        else:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode in ("L", "RGB"):
            # Most profiles are some edition of sRGB: such images stay exactly as they are.
            steps = np.indices((16, 16, 16)).astype(np.uint8).reshape(3, 64, 64).transpose(1, 2, 0) * 17
            colors = Image.fromarray(steps).convert(mode)
            plain, converted = colors.convert("RGB"), ImageCms.applyTransform(colors, transform)
            if np.abs(np.asarray(plain).astype(int) - np.asarray(converted)).max() <= 3:
                return None
        return transform
    except Exception:  # a broken profile, one for another kind of image, or Pillow without LittleCMS
        return None


@dataclass
class FoundFiles:
    """The result of [`find_files`]; all paths are relative to the folder, with `/`, and sorted.

    Attributes:
        images (`list[str]`): Image files, by their suffix in either case.
        others (`list[str]`): All other files.
        left_out (`Counter`): Numbers of files and folders that were skipped, by reason.
    """

    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def find_files(folder: str | Path) -> FoundFiles:
    """List the files of a folder and of all folders in it, links to folders included.

    Training, preparation and evaluation take the same files. Hidden files and folders (`.DS_Store`, `._a.png`,
    `.ipynb_checkpoints`, `__MACOSX`, `@eaDir`) are left out.

    Args:
        folder (`str` or `os.PathLike`): The folder.

    Raises:
        OSError: If the folder itself can't be listed.
    """
    found, waiting = FoundFiles(), [(os.fspath(folder), "", (os.path.realpath(folder),))]
    while waiting:
        path, prefix, above = waiting.pop()
        try:
            entries = list(os.scandir(path))
        except OSError:
            if not prefix:
                raise
            found.left_out["folder can't be opened"] += 1
            continue
        for entry in entries:
            is_folder = entry.is_dir()
            if any("\ud800" <= letter <= "\udfff" for letter in entry.name):  # no table takes such a name
                found.left_out["name that is not UTF-8"] += 1
            elif entry.name.startswith(".") or (is_folder and entry.name.startswith(("__", *FOREIGN_FOLDERS))):
                found.left_out["hidden"] += 1
            elif is_folder:
                real = os.path.realpath(entry.path)
                if any(Path(folder).is_relative_to(real) for folder in above):
                    found.left_out["link to a folder around it"] += 1
                else:
                    waiting.append((entry.path, f"{prefix}{entry.name}/", (*above, real)))
            elif not entry.is_file():
                found.left_out["broken link" if entry.is_symlink() else "no file"] += 1
            elif suffix(entry.name) in SUFFIXES:
                found.images.append(prefix + entry.name)
            else:
                found.others.append(prefix + entry.name)
    found.images.sort()
    found.others.sort()
    return found


def suffix(path: str) -> str:
    """The suffix of a file in lower case."""
    return os.path.splitext(path)[1].lower()


def count_others(others: list[str]) -> Counter:
    """Files that are not images, counted as reasons to be left out."""
    return Counter(f"no image ({suffix(path) or 'without a suffix'})" for path in others)


def in_words(left_out: Counter) -> str:
    """What was left out in words, for a log: `2 hidden, 1 no image (.txt)`."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.most_common()) or "nothing"
