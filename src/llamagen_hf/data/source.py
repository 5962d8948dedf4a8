"""Sources of images: any dataset that the `datasets` library reads, as a training and a test split."""

import glob
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
)

from ..images.reading import SUFFIXES, find_files, suffix
from .image_folder import read_image_files, read_image_folder


logger = logging.getLogger(__name__)

# The library's reader for each kind of file.
READERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
READERS |= {".tar": "webdataset"}
STREAM_SHARDS = 64  # parts of a streamed folder that workers and processes share out

IMAGE_TYPES = [Value(dtype) for dtype in ("string", "large_string", "binary", "large_binary")]


@dataclass
class DataConfig:
    """Where the images are: the recipe's section `data`.

    A folder holds images (in one folder per class, with captions in a `metadata.jsonl` or in text files, or flat; see
    [`~llamagen_hf.data.image_folder.read_image_folder`]), Parquet files or WebDataset tar shards.

    The rows to measure on are those of `test_split`. If it is null, or if the dataset has no such split, they are
    `test_fraction` of the training rows (at least one), drawn with `split_seed` and held out of the training. Nothing
    can be held out of a stream: it then has no test rows, as with a `test_fraction` of 0.
    """

    dataset: str = field(
        metadata={
            "help": "A Hub id, a folder, or a file pattern such as 'shards/{00000..00009}.tar' or 'a/*.parquet'."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Name of the dataset's configuration."})
    train_split: str = field(
        default="train", metadata={"help": "Split to learn from, or a part such as 'train[:1000]'."}
    )
    test_split: str | None = field(
        default="test", metadata={"help": "Split to measure on; null holds out test_fraction, as if it were missing."}
    )
    test_fraction: float = field(
        default=0.05, metadata={"help": "Share of the training rows to hold out if there is no test_split."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the choice of held-out rows."})
    image_column: str = field(
        default="image", metadata={"help": "Column with the images; in tar shards their extension, such as 'jpg'."}
    )
    label_column: str | None = field(default=None, metadata={"help": "Column with the class ids."})
    image_size: int = field(default=256, metadata={"help": "Side to crop and resize to, in pixels."})
    min_image_size: int = field(
        default=0, metadata={"help": "Images with a shorter side below this, in pixels, can't be used."}
    )
    max_bad_rows: int = field(
        default=0, metadata={"help": "How many rows that can't be used, such as broken images, may be skipped."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training, without a copy on disk."})
    shuffle_buffer_size: int = field(default=10_000, metadata={"help": "Rows among which a stream is shuffled."})

    def __post_init__(self):
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}; expected at least 0 and less than 1.")

    def load(self, split: str) -> Dataset | IterableDataset | None:
        """The rows of a split.

        Args:
            split (`str`): `"train"` or `"test"`.

        Returns:
            Rows whose images are not decoded yet: `image_column` has type `Image(decode=False)`, so a broken image
            raises only where [`~llamagen_hf.data.samples.decode_image`] opens it. An `IterableDataset` if
            `streaming`; `None` for a test split that does not exist.

        Raises:
            ValueError: If the dataset can't be read, or if it has no such split or column.
        """
        with reading(self.dataset):
            splits = open_dataset(self.dataset, self.dataset_config, None, self.streaming, is_logged=split == "train")
        is_held_out = self.test_split is None or not _has_split(splits, self.test_split)
        if split == "test" and not is_held_out:
            return self._rows(splits, self.test_split)
        if split == "test" and self.streaming:
            logger.warning("%r has no split %r, and a stream can't be held out from.", self.dataset, self.test_split)
            return None
        rows = self._rows(splits, self.train_split)
        if not is_held_out or self.streaming or not self.test_fraction:
            return rows if split == "train" else None
        if len(rows) < 2:
            raise ValueError(
                f"The dataset {self.dataset!r} is too small to hold out test rows; set test_fraction to 0."
            )
        count = min(max(1, round(len(rows) * self.test_fraction)), len(rows) - 1)
        chosen = set(random.Random(self.split_seed).sample(range(len(rows)), count))
        if split == "test":
            logger.warning("%r has no split %r: %d training rows are held out.", self.dataset, self.test_split, count)
        return rows.select([index for index in range(len(rows)) if (index in chosen) == (split == "test")])

    def label_names(self, rows: Dataset | IterableDataset) -> dict[int, str] | None:
        """Names of the classes by id; `None` if `label_column` has no names."""
        feature = rows.features.get(self.label_column)
        return dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else None

    def _rows(self, splits: dict, name: str) -> Dataset | IterableDataset:
        if not _has_split(splits, name):
            raise ValueError(f"The dataset {self.dataset!r} has no split {name!r}; it has {', '.join(splits)}.")
        with reading(self.dataset):
            if name in splits:
                rows = splits[name]
            else:
                rows = open_dataset(self.dataset, self.dataset_config, name, self.streaming, is_logged=False)
            if rows.features is None:  # a stream of files that do not say what is in them
                rows = rows._resolve_features()
        for column in (self.image_column, self.label_column):
            if column is not None and column not in rows.features:
                raise ValueError(
                    f"The dataset {self.dataset!r} has no column {column!r}; it has {', '.join(rows.features)}."
                )
        feature = rows.features[self.image_column]
        if not isinstance(feature, Image | dict) and feature not in IMAGE_TYPES:
            raise ValueError(f"The column {self.image_column!r} of {self.dataset!r} holds {feature}, not images.")
        if self.label_column is not None:
            feature = rows.features[self.label_column]
            if not isinstance(feature, ClassLabel | Value) or "int" not in feature.dtype:
                raise ValueError(
                    f"The column {self.label_column!r} of {self.dataset!r} holds {feature}, not class ids."
                )
        with reading(self.dataset):  # class ids beyond the last class among them
            return rows.cast_column(self.image_column, Image(decode=False))


@contextmanager
def reading(dataset: str) -> Iterator[None]:
    """Turns whatever is raised while a dataset is read into a `ValueError` of one sentence."""
    try:
        yield
    except Exception as error:  # pyarrow, tarfile, the Hub and other readers have no error in common
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ValueError(f"The dataset {dataset!r} can't be read: {reason}.") from error


def open_dataset(
    dataset: str, name: str | None, split: str | None, streaming: bool, is_logged: bool = True
) -> DatasetDict | IterableDatasetDict | Dataset | IterableDataset:
    """Open any dataset: a folder of images by its structure, anything else as `load_dataset` does.

    Args:
        dataset (`str`): A Hub id, a folder or a file pattern.
        name (`str`, *optional*): Of its configuration.
        split (`str`, *optional*): A split, or an expression such as `train[:1000]`; by default all splits by name.
            The files of a pattern are the split that is asked for.
        streaming (`bool`): Read while iterating.
        is_logged (`bool`): Log what was read of a folder of images.
    """
    path = os.path.expanduser(dataset)
    if os.path.isdir(path):
        if name is None and (images := read_image_folder(path)) is not None:
            if is_logged:
                images.log()
            return _choose(images.splits, split, streaming)
        folder = {}
        if glob.escape(path) != path:  # the library would take the folder for a pattern
            path, folder = _folder_reader(path), {"data_dir": glob.escape(os.path.abspath(path))}
        return load_dataset(path, name, split=split, streaming=streaming, **folder)
    kinds = [kind.lower() for kind in reversed(Path(path).suffixes)]  # of `a.jsonl.gz` the second
    if kinds and kinds[0] in SUFFIXES:
        files = [file for pattern in file_patterns(path) for file in glob.glob(pattern, recursive=True)]
        if not files:
            raise ValueError("there are no such files")
        return _choose(read_image_files(files), split, streaming)
    for kind in kinds:
        if kind in READERS:
            patterns = {(split or "train").partition("[")[0]: file_patterns(path)}
            return load_dataset(READERS[kind], name, data_files=patterns, split=split, streaming=streaming)
    if re.search(r"[*?\[{]", path):
        raise ValueError(f"a file pattern must end in one of {', '.join(READERS)}, or be of images")
    if path.startswith((".", "/")):
        raise ValueError("there is no such folder")
    return load_dataset(path, name, split=split, streaming=streaming)


def files_report(dataset: str) -> dict:
    """`files`, what was used of a folder of images and what was left out; empty for other datasets."""
    path = os.path.expanduser(dataset)
    folder = read_image_folder(path) if os.path.isdir(path) else None
    return {} if folder is None else {"files": folder.report}


def _choose(splits: DatasetDict, split: str | None, streaming: bool):
    """One split, an expression of splits, or all splits."""
    if split is not None and split not in splits:
        if streaming:
            raise ValueError(f"a stream has no part {split!r}")
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
        return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])
    if streaming:
        splits = IterableDatasetDict(
            {name: rows.to_iterable_dataset(max(1, min(len(rows), STREAM_SHARDS))) for name, rows in splits.items()}
        )
    return splits if split is None else splits[split]


def _folder_reader(path: str) -> str:
    """The library's reader for most of a folder's files."""
    readers = Counter(READERS.get(suffix(name)) for name in find_files(path).others)
    del readers[None]
    if not readers:
        raise ValueError(f"there are no files of {', '.join(READERS)} or images in it")
    return readers.most_common(1)[0][0]


def file_patterns(path: str) -> list[str]:
    """The patterns, as `glob` takes them, of a dataset that is a file or a file pattern."""
    return [_as_pattern(part) for part in _expand_ranges(path)]


def _as_pattern(path: str) -> str:
    """A file pattern in which the names of existing folders are not patterns."""
    if os.path.exists(path):
        return glob.escape(path)
    parent = next((str(parent) for parent in Path(path).parents if parent.is_dir()), "")
    return glob.escape(parent) + path[len(parent) :] if path.startswith(parent) else path


def _has_split(splits: dict, name: str) -> bool:
    """Whether all splits of an expression such as `train[:1000]+extra` exist."""
    return all(part.partition("[")[0] in splits for part in name.split("+"))


def _expand_ranges(pattern: str) -> list[str]:
    """`a{08..10}b` to `a08b`, `a09b`, `a10b`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in _expand_ranges(match.re.sub(number, pattern, count=1))]
