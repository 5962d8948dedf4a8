"""Folders of images as datasets: which files are rows, in which split, of which class, with which caption.

`datasets.load_dataset` finds splits in all names that sound like one, and silently skips what its patterns do not
match. Here only the structure of the folder decides, and every file is used or counted.
"""

import glob
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset

from ..images.reading import FoundFiles, count_others, find_files, in_words, suffix


logger = logging.getLogger(__name__)

SPLITS = dict.fromkeys(("train", "training"), "train")
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".parquet", ".arrow", ".json", ".jsonl", ".csv", ".tar", ".zip")
CAPTIONS = (".txt", ".caption")  # the first has precedence


@dataclass
class ImageFolder:
    """A folder of images as a dataset.

    Args:
        splits (`DatasetDict`): The rows: `image`, then `label` from class folders and `text` from caption files, or
            the columns of the metadata.
        report (`dict`): The number of `images` found, of those `used`, and of images and other files `left_out` for
            each reason.
        warnings (`list[str]`): What users should know about the folder, in sentences.
    """

    splits: DatasetDict
    report: dict
    warnings: list[str]

    def log(self) -> None:
        """Log the report and the warnings."""
        rows = ", ".join(f"{len(rows)} in {name}" for name, rows in self.splits.items())
        images, used = self.report["images"], self.report["used"]
        left_out = in_words(Counter(self.report["left_out"]))
        logger.info("Read %d of %d images (%s rows); left out: %s.", used, images, rows, left_out)
        for warning in self.warnings:
            logger.warning("%s", warning)


def read_image_folder(path: str | Path) -> ImageFolder | None:
    """Read a folder of images; `None` if it is another kind of dataset, such as Parquet files.

    - Splits: if all top folders are named train, validation (valid, val, dev) or test (testing, eval), in upper or
      lower case, and one of them is train, they are the splits. Otherwise everything is `train`. If a folder holds
      only one folder, that one is read in its place.
    - Classes: the folders of the images, if there are several and all images lie at the same depth.
    - Captions: `metadata.csv`, `.jsonl` or `.parquet` as `datasets` reads them, with a column `file_name`; or else a
      text file beside each image, `a.txt` or `a.caption` for `a.png`, as the column `text`.

    Rows are in the order of their paths, or of the metadata.

    Raises:
        ValueError: If metadata or captions can't be read, or if a split lacks its metadata.
    """
    path = os.path.abspath(os.path.expanduser(path))
    found = find_files(path)
    if not found.images or _is_other_dataset(path, found):
        return None
    roots, warnings = _find_splits(found.images)
    splits = {
        split: [name for name in found.images if name.startswith(tuple(prefixes))] for split, prefixes in roots.items()
    }
    metadata = [name for name in found.others if os.path.basename(name) in METADATA]
    if metadata:
        rows, used_files, used_images, others = _read_metadata(path, roots, metadata, found.images)
    else:
        rows, used_files, others = _read_files(path, roots, splits, found)
        used_images = len(found.images)
    left_out = found.left_out + count_others([name for name in found.others if name not in used_files])
    left_out["image not named in the metadata"] = len(found.images) - used_images
    report = {"images": len(found.images), "used": used_images, "left_out": dict(+left_out)}
    return ImageFolder(rows, report, warnings + others)


def read_image_files(paths: list[str]) -> DatasetDict:
    """Image files as rows of `train`, with their folders as classes, as for [`read_image_folder`]."""
    paths = sorted(os.path.abspath(path) for path in paths)
    rows, _, warnings = _read_files("", {"train": [""]}, {"train": paths}, FoundFiles(images=paths))
    for warning in warnings:
        logger.warning("%s", warning)
    return rows


def _is_other_dataset(path: str, found: FoundFiles) -> bool:
    """Whether tables or archives hold the rows, and the images only illustrate them."""
    readme = Path(path, "README.md")
    if readme.is_file():
        start, *sections = readme.read_text("utf-8", "replace").split("---", 2)
        if not start.strip() and sections and "\nconfigs:" in sections[0]:
            return True
    tables = [name for name in found.others if suffix(name) in TABLES and os.path.basename(name) not in METADATA]
    if not tables:
        return False
    stems = set(map(_stem, found.images))  # `a.json` beside `a.jpg` is about that image
    return sum(_stem(name) not in stems for name in tables) >= len(found.images)


def _find_splits(images: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The prefixes of the paths in each split, and warnings."""
    base = ""
    while True:
        tops = {top if rest else "" for top, _, rest in (name[len(base) :].partition("/") for name in images)}
        named = {top: SPLITS.get(top.lower()) for top in sorted(tops)}
        if all(named.values()) and "train" in named.values():
            found = [split for split in ("train", "validation", "test") if split in named.values()]
            return {split: [f"{base}{top}/" for top in named if named[top] == split] for split in found}, []
        if len(tops) == 1 and tops != {""}:
            base += f"{tops.pop()}/"
            continue
        warnings = []
        if alike := [top for top, split in named.items() if split]:
            beside = [f"the folder {top!r}" if top else "loose images" for top, split in named.items() if not split]
            reason = f"there is {beside[0]} beside them" if beside else "none of them is 'train'"
            warnings = [f"{', '.join(map(repr, alike))} are taken as ordinary folders, not as splits: {reason}."]
        return {"train": [""]}, warnings


def _read_metadata(path: str, roots: dict, metadata: list[str], images: list[str]) -> tuple:
    """Rows, the metadata files that they come from, the number of images that they use, and warnings."""
    files = {}
    for split, prefixes in roots.items():
        prefixes = tuple(prefixes) if len(roots) > 1 else ""
        files[split] = [name for name in metadata if name.startswith(prefixes)]
        if not files[split]:
            raise ValueError(f"there is {metadata[0]}, but no metadata in the folder of the split {split!r}")
    patterns = {split: [glob.escape(os.path.join(path, name)) for name in files[split]] for split in files}
    rows = load_dataset("imagefolder", data_files=patterns)
    on_disk, named = {os.path.join(path, name) for name in images}, []
    for part in rows.values():
        for column, feature in part.features.items():
            if isinstance(feature, Image):
                values = part.cast_column(column, Image(decode=False))[column]
                named += [value["path"] for value in values if value is not None]
    used, warnings = on_disk.intersection(named), []
    if absent := sum(name not in on_disk for name in named):
        warnings.append(f"{absent} row(s) of the metadata name images that do not exist.")
    if unnamed := len(on_disk) - len(used):
        warnings.append(f"{unnamed} of {len(on_disk)} images are not named in the metadata, so they are not rows.")
    return rows, {name for names in files.values() for name in names}, len(used), warnings


def _read_files(path: str, roots: dict, splits: dict[str, list[str]], found: FoundFiles) -> tuple:
    """Rows, the caption files that they use, and warnings."""
    features, warnings = {"image": Image()}, []
    prefixes = [root for split in roots.values() for root in split]
    inner = [name.removeprefix(next(filter(name.startswith, prefixes))) for name in found.images]
    depths = {name.count("/") for name in inner}
    labels = {_label(name) for name in inner}
    has_labels = len(labels) > 1 and len(depths) == 1
    if len(depths) > 1:
        high, low = (min(inner, key=lambda name: sign * name.count("/")) for sign in (1, -1))
        warnings.append(f"Folders are not taken as classes: {low!r} lies deeper than {high!r}.")
    if has_labels:
        features["label"] = ClassLabel(names=sorted(labels))
    captions = {}
    stems = set(map(_stem, found.images))
    for kind in reversed(CAPTIONS):
        captions |= {_stem(name): name for name in found.others if suffix(name) == kind and _stem(name) in stems}
    if captions:
        features["text"] = Value("string")
        if without := sum(_stem(name) not in captions for name in found.images):
            warnings.append(f"{without} of {len(found.images)} images have no caption file beside them.")
    rows = DatasetDict()
    for split, images in splits.items():
        # Arrow's arrays are converted ten times as fast as lists.
        columns = {"image": pa.array([os.path.join(path, name) for name in images], pa.string())}
        if has_labels:
            columns["label"] = pa.array(features["label"].str2int([_label(name) for name in images]), pa.int64())
        if captions:
            columns["text"] = [_read_caption(path, captions.get(_stem(name))) for name in images]
        rows[split] = Dataset.from_dict(columns, Features(features))
    return rows, set(captions.values()), warnings


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _label(name: str) -> str:
    return os.path.basename(os.path.dirname(name))


def _read_caption(path: str, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return Path(path, name).read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"the caption {name!r} can't be read as UTF-8 text") from None
