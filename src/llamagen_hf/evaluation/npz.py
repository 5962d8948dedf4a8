"""Batches of images as `.npz`, the format of ADM's evaluator, read and written image by image."""

import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


ARRAY = "arr_0"  # what numpy.savez calls the first array, as ADM's sampling scripts write it


class NpzImages:
    """The images of an `.npz`, read from the disk as they are asked for.

    Args:
        path (`str` or `os.PathLike`): The file.

    Attributes:
        shape (`tuple[int, int, int, int]`): Number, height, width and 3.

    Raises:
        OSError: In one sentence, if the file is no `.npz`, is damaged, or has no array `arr_0`.
        ValueError: In one sentence, if that array holds no 8-bit RGB images.
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
        name = f"{ARRAY}.npy"
        try:
            with zipfile.ZipFile(self.path) as archive:
                if name not in archive.namelist():
                    names = ", ".join(member.removesuffix(".npy") for member in archive.namelist()) or "nothing"
                    raise OSError(f"{self.path.name!r} holds no images: it has no {ARRAY}, but {names}.")
                with archive.open(name) as file:
                    version = np.lib.format.read_magic(file)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    if version not in read:
                        raise ValueError(f"{self.path.name!r} has an array of an unknown format, {version}.")
                    shape, is_fortran, dtype = read[version](file)
                    if is_fortran:
                        raise ValueError(f"{self.path.name!r} has its array in Fortran order; save it in C order.")
                    yield file, shape, dtype
        except FileNotFoundError as error:
            raise OSError(f"There is no file {str(self.path)!r}.") from error
        except (zipfile.BadZipFile, EOFError) as error:
            raise OSError(f"{self.path.name!r} is no .npz file, or is damaged: {error}.") from error


def read_arrays(path: str | Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an `.npz` holds, without running any code in it.

    Raises:
        OSError: In one sentence, if the file is no `.npz` or is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except FileNotFoundError as error:
        raise OSError(f"There is no file {str(path)!r}.") from error
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise OSError(f"{Path(path).name!r} is no .npz file, or is damaged: {error}.") from error


def write_arrays(path: str | Path, **arrays: np.ndarray) -> None:
    """Write arrays as `.npz`, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_images(path: str | Path, images: Iterable[np.ndarray], count: int) -> None:
    """Write images as the `.npz` that ADM's `evaluator.py` reads, one in memory at a time; whole or not at all.

    Args:
        path (`str` or `os.PathLike`): The file, replaced if it exists.
        images (`Iterable[np.ndarray]`): Images `(height, width, 3)`, uint8, all of one size.
        count (`int`): How many there are, which the file says at its beginning.

    Raises:
        ValueError: In one sentence, if they are of different sizes or not as many.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    written, shape = 0, None
    try:
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
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
