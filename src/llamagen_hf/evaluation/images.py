"""Images to measure, from folders, `.npz` files, datasets or arrays."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from ..images.files import count_others, find_files, in_words
from ..images.reading import read_image
from ..images.transforms import center_crop
from .npz import NpzImages


logger = logging.getLogger(__name__)


class Images:
    """Images of one size in a fixed order; see [`open_images`].

    Args:
        name (`str`): What reports call them, without a folder of this machine.
        names (`Sequence[str]`): The name of each image, for errors.
        open_one (`Callable`): Opens the image at an index: a PIL image, or `(height, width, 3)` uint8. It is called
            in ascending order.
        read_bytes (`Callable`): Reads the content at an index, to be hashed.
        image_size (`int`, *optional*): Side to crop and resize to; by default all images must have the same size.
        skip_bad (`bool`, *optional*, defaults to `False`): Leave out images that can't be used instead of raising.

    Attributes:
        skipped (`dict[str, str]`): Images left out so far, and why.
        left_out (`dict[str, int]`): In a folder, the number of files that do not count as images, by reason.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        open_one: Callable[[int], Image.Image | np.ndarray],
        read_bytes: Callable[[int], bytes],
        image_size: int | None = None,
        skip_bad: bool = False,
    ):
        if not names:
            raise ValueError(f"There are no images in {name!r}.")
        self.name = name
        self.skipped: dict[str, str] = {}
        self.left_out: dict[str, int] = {}
        self._names, self._open_one, self._read_bytes = names, open_one, read_bytes
        self._image_size, self._skip_bad = image_size, skip_bad

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Images `(height, width, 3)`, uint8.

        Raises:
            ValueError: If an image is broken or differs in size; the error names it.
        """
        size = first = None
        for index, name in enumerate(self._names):
            try:
                image = self._open_one(index)
                if self._image_size is not None:
                    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
                    image = center_crop(image, self._image_size)
                image = np.array(image)
            except ValueError as error:
                if not self._skip_bad:
                    raise
                self.skipped[name] = str(error)
                continue
            if size is not None and image.shape != size:
                raise ValueError(
                    f"The images of {self.name!r} differ in size: {first} is {size[1]} x {size[0]} pixels, {name} "
                    f"{image.shape[1]} x {image.shape[0]}; give a size to bring them all to."
                )
            size, first = image.shape, first or name
            yield image

    def batches(self, batch_size: int, count: int | None = None) -> Iterator[np.ndarray]:
        """Batches `(n, height, width, 3)` of up to `batch_size` of all or of the first `count` images, uint8.

        Raises:
            ValueError: As for iteration.
        """
        images = islice(self, count)
        while batch := list(islice(images, batch_size)):
            yield np.stack(batch)

    def fingerprint(self) -> str:
        """Hash of the content and of its preparation; equal for the same images in another place."""
        digest = hashlib.sha256(f"sRGB {self._image_size} {self._skip_bad} {len(self)}".encode())
        for index in range(len(self)):
            try:
                content = self._read_bytes(index)
            except (OSError, ValueError):  # opening the image will raise or skip it
                content = b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()


def open_images(
    source, image_size: int | None = None, split: str = "test", image_column: str = "image", skip_bad: bool = False
) -> Images:
    """Open images to measure.

    Args:
        source: A folder of image files, read recursively in the order of their paths; an `.npz` as ADM's evaluator
            reads it; a dataset of the `datasets` library, its Hub id or its folder; an array `(n, height, width, 3)`
            of uint8; a list of PIL images; or [`Images`], which are returned as they are.
        image_size (`int`, *optional*): Side in pixels to crop and resize to, as ADM prepares ImageNet. By default
            images stay as they are and must have the same size.
        split (`str`, *optional*, defaults to `"test"`): Split of a dataset.
        image_column (`str`, *optional*, defaults to `"image"`): Column of a dataset with the images.
        skip_bad (`bool`, *optional*, defaults to `False`): Leave out, and count, images that can't be used.

    Returns:
        [`Images`]: RGB, as [`~llamagen_hf.images.reading.read_image`] reads them.

    Raises:
        OSError: If a file is missing or damaged.
        ValueError: If there are no images of a kind that can be read.
    """
    options = {"image_size": image_size, "skip_bad": skip_bad}
    if isinstance(source, Images):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
            raise ValueError(f"The array is {source.dtype} {source.shape}; expected uint8 (n, height, width, 3).")
        return _from_arrays("array", len(source), source.__getitem__, options)
    if isinstance(source, list):
        if not all(isinstance(image, Image.Image) for image in source):
            raise ValueError("A list of images must hold PIL images alone.")
        return _from_arrays("list", len(source), lambda i: np.array(read_image(source[i], f"image {i}")), options)
    if not isinstance(source, (str, Path)):
        return _from_rows(source, "dataset", image_column, options)
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        stored = NpzImages(path)
        reader, position = iter(stored), 0

        def read_next(index: int) -> np.ndarray:
            nonlocal reader, position
            if index != position:  # another pass, from the beginning
                reader, position = iter(stored), 0
            position += 1
            return next(reader)

        return _from_arrays(path.name, len(stored), read_next, options)
    if path.is_dir():
        found = find_files(path)
        if names := found.images:
            images = Images(
                path.resolve().name,
                names,
                lambda i: read_image(path / names[i], names[i]),
                lambda i: (path / names[i]).read_bytes(),
                **options,
            )
            left_out = found.left_out + count_others(found.others)
            # Sampling for an evaluation, like tools that download images, writes JSON beside them.
            is_notable = found.left_out or any(Path(other).suffix.lower() != ".json" for other in found.others)
            level = logging.WARNING if is_notable else logging.INFO
            logger.log(level, "%s: %d images; left out: %s.", images.name, len(names), in_words(left_out))
            images.left_out = dict(left_out)
            return images
    from ..data.source import DataConfig

    rows = DataConfig(str(source), train_split=split, test_split=None, test_fraction=0, image_column=image_column)
    return _from_rows(rows.load("train"), path.name if path.exists() else str(source), image_column, options)


def _from_arrays(name: str, count: int, get: Callable[[int], np.ndarray], options: dict) -> Images:
    def read_bytes(index: int) -> bytes:
        image = get(index)
        return f"{image.shape}".encode() + image.tobytes()

    return Images(name, [f"image {index}" for index in range(count)], get, read_bytes, **options)


def _from_rows(rows, name: str, image_column: str, options: dict) -> Images:
    import datasets

    from ..data.bad_rows import BadRow
    from ..data.images import decode_image

    if not isinstance(rows, datasets.Dataset) or image_column not in rows.features:
        raise ValueError(f"{name!r} is not a dataset with a column {image_column!r}, nor any other source of images.")
    rows = rows.cast_column(image_column, datasets.Image(decode=False))

    def open_one(index: int) -> Image.Image:
        try:
            return decode_image(rows[index][image_column])
        except BadRow as error:
            raise ValueError(f"Row {index} of {name!r} can't be used: {error}.") from error

    def read_bytes(index: int) -> bytes:
        value = rows[index][image_column] or {"bytes": b""}
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()

    return Images(name, [f"row {index}" for index in range(len(rows))], open_one, read_bytes, **options)
