"""The output of a stage: Parquet shards that a run which was killed need not write again."""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from datasets.table import embed_table_storage
from datasets.utils.file_utils import is_local_path
from PIL import Image

from ..arguments import check_choices
from ..files import replacing, write_json
from ..processes import this_process
from .fingerprint import INPUTS_FILE, Inputs, claim_inputs, fingerprint_checkpoint, fingerprint_dataset
from .samples import BadRow, decode_image
from .source import files_report, open_dataset, reading


logger = logging.getLogger(__name__)

RECORD = ".prepare.json"  # hidden, so that load_dataset skips it
COUNTS = b"llamagen_hf"
SHARD = re.compile(r"(train|test)-\d{5,}\.parquet")
PARTIAL = re.compile(rf"\.?{SHARD.pattern}(\.\w+)?\.partial")
ROW_GROUP_SIZE = 100  # rows with images are large, and a reader holds a row group at a time
# Settings that may change between two runs. What is read is compared by its content.
FREE_SETTINGS = ("output_dir", "batch_size", "device_map", "overwrite", "dataset", "model", "aesthetic_head")


@dataclass
class StageConfig:
    """The settings that all stages of the preparation have: `filter`, `score` and `recaption`."""

    dataset: str = field(metadata={"help": "Hub id, folder, or file pattern such as 'rows/*.parquet'."})
    output_dir: str = field(metadata={"help": "Folder for the resulting rows, as Parquet shards."})
    split: str = field(default="train", metadata={"help": "Split to read."})
    rows_per_shard: int = field(default=1000, metadata={"help": "Rows of an output file, held in memory."})
    overwrite: bool = field(default=False, metadata={"help": "Start over: remove the shards in output_dir first."})

    def __post_init__(self):
        check_choices(self)


def open_rows(config: StageConfig, columns: list[str]) -> IterableDataset:
    """Stream the rows of `config.dataset`: a Hub id, a folder or a file pattern.

    Raises:
        ValueError: If the dataset can't be read, or lacks one of `columns`.
    """
    with reading(config.dataset):
        rows = open_dataset(config.dataset, None, config.split, streaming=True)
        if rows.features is None:  # the types in a CSV file are known only once rows are read
            rows = rows.cast(Dataset.from_list(list(rows.take(1000))).features)
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(f"The dataset has no column {column!r}; it has {', '.join(rows.column_names)}.")
    return rows


def shard_path(folder: str | Path, index: int, split: str = "train") -> Path:
    """The file of the shard with this number, from 0 on."""
    return Path(folder, f"{split}-{index:05d}.parquet")


def claim_shards(
    folder: Path, record: str, before: dict | None, settings: dict, inputs: Inputs, overwrite: bool
) -> bool:
    """Check that the shards in a folder are of this run, or that the folder has none; make it if need be.

    Args:
        folder (`Path`): The folder of the shards.
        record (`str`): Name of the file in it that says how they were made.
        before (`dict`, *optional*): The settings in that file; `None` if there is none.
        settings (`dict`): The settings of this run that decide the result.
        inputs (`Inputs`): Fingerprints of what this run reads.
        overwrite (`bool`): Remove the shards of an earlier run.

    Returns:
        `bool`: Whether there are shards to go on with.

    Raises:
        ValueError: If the shards are of other settings or of other input, or if they have no record.
    """
    if before is not None:
        for path in folder.glob("*.partial"):  # of a run that was killed
            if PARTIAL.fullmatch(path.name):
                path.unlink()
    if before is not None and overwrite:
        shards = [path for path in folder.glob("*.parquet") if SHARD.fullmatch(path.name)]
        for path in (*shards, folder / record, folder / INPUTS_FILE):  # in this order: shards always have a record
            path.unlink(missing_ok=True)
        before = None
    if before is None and any(folder.glob("*.parquet")):
        raise ValueError(f"{folder} holds files of something else; give another output_dir.")
    changes = []
    for name in sorted(before.keys() | settings) if before is not None else ():
        if before.get(name) != settings.get(name):
            changes.append(f"{name} {before.get(name)!r}, not {settings.get(name)!r}")
    if changes:
        raise ValueError(
            f"{folder} was begun with other settings ({'; '.join(changes)}); give another output_dir, or start over "
            "with --overwrite."
        )
    claim_inputs(folder, inputs, goes_on=before is not None)
    return before is not None


def open_folder(config: StageConfig, inputs: Inputs) -> dict:
    """The record of the run in `config.output_dir`; arguments and errors as for [`claim_shards`]."""
    folder, record = Path(config.output_dir), {}
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    settings["stage"] = type(config).__name__
    if is_begun := (folder / RECORD).is_file():
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    before = {n: v for n, v in record["settings"].items() if n not in FREE_SETTINGS} if is_begun else None
    if not claim_shards(folder, RECORD, before, settings, inputs, config.overwrite):
        record = {"settings": settings}
        write_json(folder / RECORD, record)
    return record


def fingerprint_inputs(config, rows: IterableDataset) -> Inputs:
    """Fingerprints of the images and the model that a stage reads."""
    inputs = fingerprint_dataset(config.dataset, config.output_dir, [rows], config.image_column)
    return inputs | {"the model": fingerprint_checkpoint(config.model)}


def write_shard(table: pa.Table, path: Path, counts: dict | None = None, row_group_size: int | None = None) -> None:
    """Write one shard, images included, whole or not at all; `counts` go into its metadata."""
    table = embed_table_storage(table)
    if counts is not None:
        table = table.replace_schema_metadata(table.schema.metadata | {COUNTS: json.dumps(counts)})
    with replacing(path) as partial:
        pq.write_table(table, partial, row_group_size=row_group_size)


def decode_batches(
    cells: list[dict | None], indices: Iterable[int], batch_size: int
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """The images at `indices` that can be decoded, in mode RGB, in batches with their indices."""

    def decode():
        for index in indices:
            try:
                yield index, decode_image(cells[index])
            except BadRow:
                continue

    decoded = decode()
    while batch := list(islice(decoded, batch_size)):
        yield [index for index, _ in batch], [image for _, image in batch]


def add_columns(
    config, rows: IterableDataset, features: dict[str, Value], compute: Callable[[dict], tuple[dict, dict]]
) -> dict:
    """Write `rows` with new or changed columns, shard by shard; each process takes every n-th shard that is missing.

    Args:
        config ([`StageConfig`]): Settings of the stage.
        rows (`datasets.IterableDataset`): Rows with images in `config.image_column`.
        features (`dict[str, datasets.Value]`): Types of the columns.
        compute (`Callable`): From a shard's columns to the columns to write, and numbers to add up for the report.

    Returns:
        `dict`: `shards` and `rows` in the output folder, the sums of what `compute` counted, and `files`.
    """
    features = Features({**rows.features, config.image_column: ImageFeature(), **features})
    rows = rows.cast_column(config.image_column, ImageFeature(decode=False))
    process = this_process()
    for index, shard in enumerate(rows.iter(batch_size=config.rows_per_shard)):
        path = shard_path(config.output_dir, index)
        if index % process.num_processes != process.process_index or path.exists():
            continue
        # A file that does not exist can't be stored; as a missing image it counts as undecodable.
        shard[config.image_column] = [None if _is_absent(cell) else cell for cell in shard[config.image_column]]
        columns, counts = compute(shard)
        table = Dataset.from_dict(shard | columns, features=features).data.table
        write_shard(table, path, counts, ROW_GROUP_SIZE)
        logger.info("%s: %d rows, %s", path.name, len(table), counts)
    process.wait_for_everyone()

    report = Counter(shards=0, rows=0)
    for path in Path(config.output_dir).glob("train-*.parquet"):
        metadata = pq.read_metadata(path)
        report.update(json.loads(metadata.metadata[COUNTS]) | {"shards": 1, "rows": metadata.num_rows})
    return dict(report) | files_report(config.dataset)


def _is_absent(cell: dict | None) -> bool:
    """Whether an image is only the path of a local file that does not exist."""
    path = cell and cell["bytes"] is None and cell["path"]
    return bool(path) and is_local_path(path) and not Path(path).is_file()
