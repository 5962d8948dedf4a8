"""Tables of images and captions: read as a stream, written as Parquet shards that a killed run need not repeat."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, IterableDataset
from datasets.table import embed_table_storage

from .fingerprint import INPUTS_FILE, Inputs, claim_inputs
from .source import open_dataset


RECORD = ".prepare.json"  # hidden, so that load_dataset passes over it
COUNTS = b"llamagen_hf"
SHARD = re.compile(r"train-\d{5,}\.parquet")
# A run may go on with others. What is at a place is compared by its content.
FREE_SETTINGS = ("output_dir", "batch_size", "device_map", "overwrite", "dataset", "model", "aesthetic_head")


def open_rows(config, columns: list[str]) -> IterableDataset:
    """Stream `config.dataset`, a Hub id, a folder or a file pattern; a `ValueError` if it lacks one of `columns`."""
    try:
        rows = open_dataset(config.dataset, None, config.split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The dataset {config.dataset!r} can't be read; give a Hub id, a folder or a file pattern ({error})."
        ) from error
    if rows.features is None:  # the types in a CSV file are known only once rows are read
        rows = rows.cast(Dataset.from_list(list(rows.take(1000))).features)
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(f"The dataset has no column {column!r}; it has {', '.join(rows.column_names)}.")
    return rows


def open_folder(config, inputs: Inputs) -> dict:
    """The record of the run in `config.output_dir`; with `config.overwrite` a new one, in an empty folder.

    Args:
        config: Settings of the stage.
        inputs (`Inputs`): Fingerprints of what it reads.

    Raises:
        ValueError: If that run has other settings or other input, or the folder holds something else.
    """
    folder = Path(config.output_dir)
    settings = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    settings["stage"] = type(config).__name__
    begun = (folder / RECORD).is_file()
    shards = list(folder.glob("*.parquet"))
    if begun and config.overwrite:
        for path in (*shards, folder / RECORD, folder / INPUTS_FILE):  # in this order: shards have a record, always
            if path.suffix != ".parquet" or SHARD.fullmatch(path.name):
                path.unlink(missing_ok=True)
        begun, shards = False, list(folder.glob("*.parquet"))
    if shards and not begun:
        raise ValueError(f"{folder} holds files of something else; give another output_dir.")
    record = {"settings": settings}
    if begun:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if others := [name for name in settings if record["settings"].get(name) != settings[name]]:
            raise ValueError(
                f"{folder} was begun with other settings ({', '.join(others)}); give another output_dir, or start "
                "over with --overwrite."
            )
    claim_inputs(folder, inputs, goes_on=begun)
    write_record(config, record)
    return record


def write_record(config, record: dict) -> None:
    partial = Path(config.output_dir, f"{RECORD}.{os.getpid()}")  # several processes may begin a run together
    partial.write_text(json.dumps(record, indent=2), encoding="utf-8")
    partial.replace(Path(config.output_dir, RECORD))


def shard_path(config, index: int) -> Path:
    return Path(config.output_dir, f"train-{index:05d}.parquet")


def write_shard(table: pa.Table, path: Path, counts: dict | None = None, row_group_size: int | None = None) -> None:
    """Write one shard, images included, so that it appears only once it is whole; `counts` go into its metadata."""
    table = embed_table_storage(table)
    if counts is not None:
        table = table.replace_schema_metadata(table.schema.metadata | {COUNTS: json.dumps(counts)})
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial, row_group_size=row_group_size)
    partial.replace(path)
