"""Images to measure, from wherever they are: files, `.npz` batches, datasets, arrays."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..images.reading import count_others, find_files, in_words, read_image
from ..images.transforms import center_crop
from .npz import NpzImages


logger = logging.getLogger(__name__)


class Images:
    """Images of one size, in an order of their own; see [`open_images`].

    Args:
        name (`str`): What they are called in reports, without a folder of this machine.
        names (`Sequence[str]`): A name for each, for errors.
        open_one (`Callable`): Opens the image at an index: a PIL image, or `(height, width, 3)` uint8. It is called
            in ascending order.
        read_bytes (`Callable`): The content at an index, to be hashed.
        image_size (`int`, *optional*): Side to crop and resize to; by default they must be of one size as they are.
        skip_bad (`bool`): Leave out what can't be used, instead of raising.

    Attributes:
        skipped (`dict[str, str]`): Images left out so far, and why.
        left_out (`dict[str, int]`): Of a folder, the files that do not count as images, by reason.
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
            ValueError: In one sentence that names the image, if one is broken or of another size.
        """
        size = first = None
        for index, name in enumerate(self._names):
            try:
                image = self._prepare(self._open_one(index))
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

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Batches `(n, height, width, 3)` of up to `batch_size` images, uint8; errors as for iteration."""
        batch = []
        for image in self:
            batch.append(image)
            if len(batch) == batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    def fingerprint(self) -> str:
        """Hash of the content and of how it is prepared; the same images elsewhere have the same."""
        digest = hashlib.sha256(f"sRGB {self._image_size} {self._skip_bad} {len(self)}".encode())
        for index in range(len(self)):
            try:
                content = self._read_bytes(index)
            except (OSError, ValueError):  # to be refused or left out when it is opened
                content = b""
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def _prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(image, np.ndarray) and self._image_size is None:
            return image
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if self._image_size is not None:
            image = center_crop(image, self._image_size)
        return np.array(image)


def open_images(
    source,
    image_size: int | None = None,
    split: str = "test",
    image_column: str = "image",
    skip_bad: bool = False,
) -> Images:
    """Open images to measure.

    Args:
        source: A folder of image files, read with all its folders in the order of their paths; an `.npz` as ADM's
            evaluator reads it; a dataset of the Hub or of the `datasets` library, or its id; an array
            `(n, height, width, 3)` of uint8; a list of PIL images; or [`Images`], which are returned as they are.
        image_size (`int`, *optional*): Side to crop and resize to, as ADM prepares ImageNet. By default images stay
            as they are, and must be of one size.
        split (`str`, *optional*, defaults to `"test"`): Split of a dataset.
        image_column (`str`, *optional*, defaults to `"image"`): Column of a dataset with the images.
        skip_bad (`bool`, *optional*, defaults to `False`): Leave out, and count, images that can't be used.

    Returns:
        [`Images`]: RGB, as [`~llamagen_hf.images.reading.read_image`] reads them.

    Raises:
        OSError or ValueError: In one sentence, if there are no images there, or not such.
    """
    options = {"image_size": image_size, "skip_bad": skip_bad}
    if isinstance(source, Images):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
            raise ValueError(f"The array is {source.dtype} {source.shape}; expected uint8 (n, height, width, 3).")
        return Images("array", _numbers(source), source.__getitem__, lambda i: _content(source[i]), **options)
    if isinstance(source, list):
        if not all(isinstance(image, Image.Image) for image in source):
            raise ValueError("A list of images must hold PIL images alone.")
        return Images(
            "list",
            _numbers(source),
            lambda i: read_image(source[i], f"image {i}"),
            lambda i: _content(np.array(read_image(source[i]))),
            **options,
        )
    if not isinstance(source, (str, Path)):
        return _from_rows(source, "dataset", image_column, options)
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return _from_npz(path, options)
    if path.is_dir():
        found = find_files(path)
        if names := found.images:
            left_out = found.left_out + count_others(found.others)
            # JSON is what drawings for an evaluation, and tools that download images, note beside them.
            level = logging.WARNING if set(left_out) - {"no image (.json)"} else logging.INFO
            logger.log(level, "%s: %d images; left out: %s.", path.resolve().name, len(names), in_words(left_out))
            images = Images(
                path.resolve().name,
                names,
                lambda i: read_image(path / names[i], names[i]),
                lambda i: (path / names[i]).read_bytes(),
                **options,
            )
            images.left_out = dict(left_out)
            return images
    from ..data.source import DataConfig

    rows = DataConfig(str(source), train_split=split, test_split=None, test_fraction=0, image_column=image_column)
    return _from_rows(rows.load("train"), path.name if path.exists() else str(source), image_column, options)


def _numbers(values) -> list[str]:
    return [f"image {index}" for index in range(len(values))]


def _content(image: np.ndarray) -> bytes:
    """What an open image shows: its size and its numbers."""
    return f"{image.shape}".encode() + image.tobytes()


def _from_npz(path: Path, options: dict) -> Images:
    pictures = NpzImages(path)
    state = {"next": 0, "reader": iter(pictures)}

    def open_one(index: int) -> np.ndarray:
        if index != state["next"]:  # from the beginning, for another pass
            state.update(next=0, reader=iter(pictures))
        state["next"] += 1
        return next(state["reader"])

    return Images(path.name, _numbers(pictures), open_one, lambda i: _content(open_one(i)), **options)


def _from_rows(rows, name: str, image_column: str, options: dict) -> Images:
    import datasets

    from ..data.samples import BadRow, decode_image

    if not isinstance(rows, datasets.Dataset) or image_column not in rows.features:
        raise ValueError(f"{name!r} is no dataset with a column {image_column!r}, and nothing else with images.")
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
