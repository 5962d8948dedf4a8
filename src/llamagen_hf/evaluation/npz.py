"""Batches of images as `.npz`, the format of ADM's evaluator, read and written image by image."""

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..files import replacing


ARRAY = "arr_0"  # what numpy.savez calls the first array, as ADM's sampling scripts write it
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class NpzImages:
    """The images of an `.npz`, read from disk one at a time. `shape` is their number, height, width and 3.

    Raises:
        OSError: If the file is missing or damaged, is not an `.npz`, or has no array `arr_0`.
        ValueError: If that array does not hold 8-bit RGB images.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._open() as (_, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise ValueError(
                    f"{ARRAY} of {self.path.name!r} is {dtype} {shape}; expected uint8 (n, height, width, 3)."
                )
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        size = int(np.prod(self.shape[1:]))
        with self._open() as (file, shape, _):
            for index in range(shape[0]):
                data = file.read(size)
                if len(data) < size:
                    raise OSError(f"{self.path.name!r} is cut off: image {index} of {shape[0]} is not complete.")
                yield np.frombuffer(data, np.uint8).reshape(shape[1:])

    @contextmanager
    def _open(self) -> Iterator[tuple]:
        """The array's data, its shape and its dtype."""
        with _open_archive(self.path) as archive:
            if f"{ARRAY}.npy" not in archive.namelist():
                names = ", ".join(name.removesuffix(".npy") for name in archive.namelist()) or "nothing"
                raise OSError(f"{self.path.name!r} holds no images: it has no {ARRAY}, but {names}.")
            with archive.open(f"{ARRAY}.npy") as file:
                version = np.lib.format.read_magic(file)
                if version not in HEADERS:
                    raise ValueError(f"{self.path.name!r} has an array of an unknown format, {version}.")
                shape, is_fortran, dtype = HEADERS[version](file)
                if is_fortran:
                    raise ValueError(f"{self.path.name!r} has its array in Fortran order; save it in C order.")
                yield file, shape, dtype


@contextmanager
def _open_archive(path: str | Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError as error:
        raise OSError(f"There is no file {str(path)!r}.") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise OSError(f"{Path(path).name!r} is not an .npz file, or is damaged: {error}.") from error


def array_names(path: str | Path) -> list[str]:
    """Names of the arrays in an `.npz`; an `OSError` if the file is missing, damaged, or not an `.npz`."""
    with _open_archive(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_arrays(path: str | Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read those of the named arrays that an `.npz` holds, without running code in it; errors as [`array_names`]."""
    held = set(array_names(path))
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in held}
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise OSError(f"{Path(path).name!r} is not an .npz file, or is damaged: {error}.") from error


def write_arrays(path: str | Path, **arrays: np.ndarray) -> None:
    """Write arrays as `.npz`, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)


def write_images(path: str | Path, images: Iterable[np.ndarray], count: int) -> None:
    """Write images as the `.npz` that ADM's `evaluator.py` reads, one in memory at a time; whole or not at all.

    Args:
        path (`str` or `os.PathLike`): The file, replaced if it exists.
        images (`Iterable[np.ndarray]`): Images `(height, width, 3)`, uint8, all of one size.
        count (`int`): The number of images; the file states it at its beginning.

    Raises:
        ValueError: If the images differ in size, or their number is not `count`.
    """
    written, shape = 0, None
    with replacing(path) as partial:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(f"{ARRAY}.npy", "w", force_zip64=True) as file:
                for image in images:
                    if shape is None:
                        shape = image.shape
                        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
                        np.lib.format.write_array_header_1_0(file, header)
                    if image.shape != shape or image.dtype != np.uint8:
                        raise ValueError(f"Image {written} is {image.dtype} {image.shape}, the first uint8 {shape}.")
                    file.write(np.ascontiguousarray(image).data)
                    written += 1
        if written != count:
            raise ValueError(f"There are {written} images, not {count}.")
