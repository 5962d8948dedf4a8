"""Metadata filter: which rows of a web-scale table of images are worth downloading.

LlamaGen (arXiv 2406.06525, text-conditional image generation) keeps 50M of the 600M rows of LAION-COCO, by valid URL,
aesthetic score, watermark score, CLIP similarity and image size. The paper names no thresholds.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..files import write_json
from ..processes import on_main_process
from .fingerprint import fingerprint_dataset
from .shards import RECORD, StageConfig, open_folder, open_rows, shard_path, write_shard
from .source import files_report


VALID_URL = r"^https?://([^\s/?#@]*@)?(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:\d*)?([/?#]|$)"
SPARE_SCORES = 65_536


@dataclass
class FilterConfig(StageConfig):
    """One run of [`filter_rows`]: the recipe's section `filter`, beside the settings of [`StageConfig`].

    The columns have the names of LAION's tables.
    """

    valid_url: bool = field(default=True, metadata={"help": "Keep http(s) URLs with a host; nothing is requested."})
    min_aesthetic: float | None = field(
        default=None, metadata={"help": "Lowest aesthetic score to keep (Stable Diffusion 1: 5); unset: any."}
    )
    max_watermark: float | None = field(
        default=None, metadata={"help": "Highest watermark probability to keep (Stable Diffusion 1: 0.5); unset: any."}
    )
    min_similarity: float | None = field(
        default=None, metadata={"help": "Lowest CLIP similarity of image and text to keep; unset: any."}
    )
    min_side: int | None = field(
        default=None, metadata={"help": "Lowest width and height to keep, in pixels; unset: any."}
    )
    target_count: int | None = field(
        default=None,
        metadata={"help": "Of the rows that pass, keep only this many, the best (LlamaGen: 50 million)."},
    )
    rank_by: str | None = field(
        default=None, metadata={"help": "Column that says which rows are best, high is good; unset: aesthetic_column."}
    )
    url_column: str = field(default="URL", metadata={"help": "Column with the images' addresses."})
    aesthetic_column: str = field(default="aesthetic", metadata={"help": "Column with aesthetic scores."})
    watermark_column: str = field(default="pwatermark", metadata={"help": "Column with watermark probabilities."})
    similarity_column: str = field(default="similarity", metadata={"help": "Column with CLIP similarities."})
    width_column: str = field(default="WIDTH", metadata={"help": "Column with widths, in pixels."})
    height_column: str = field(default="HEIGHT", metadata={"help": "Column with heights, in pixels."})
    batch_size: int = field(default=10_000, metadata={"help": "Rows read at a time."})
    rows_per_shard: int = field(default=100_000, metadata={"help": "Rows of an output file, held in memory."})

    def rules(self) -> dict[str, tuple[list[str], float, float]]:
        """The rules that apply, in the order in which a row meets them: columns, lowest and highest value to keep."""
        rules = {
            "url": ([self.url_column], 1 if self.valid_url else None, None),
            "aesthetic": ([self.aesthetic_column], self.min_aesthetic, None),
            "watermark": ([self.watermark_column], None, self.max_watermark),
            "similarity": ([self.similarity_column], self.min_similarity, None),
            "image_size": ([self.width_column, self.height_column], self.min_side, None),
        }
        return {
            name: (columns, -np.inf if low is None else low, np.inf if high is None else high)
            for name, (columns, low, high) in rules.items()
            if (low, high) != (None, None)
        }


def filter_rows(config: FilterConfig) -> dict:
    """Keep the rows that pass every rule, in their order; with `target_count`, the best of those.

    A row counts as dropped by the first rule it fails: `url`, `aesthetic`, `watermark`, `similarity`, `image_size`,
    `rank`. A value that is null or NaN (for `rank`, also infinite) fails its rule and counts as missing there too. Of
    rows that tie at the threshold of `rank`, the first ones stay. With `target_count` the table is read twice, and
    each row to keep takes 12 bytes of memory (0.6 GB for 50M), whatever the size of the table. A run that was killed
    goes on where it stopped if its input is still the same: existing shards are not written again. Of several
    processes the first one does the work.

    Returns:
        `dict`: `seen` and `kept` rows, rows `dropped` and `missing` by rule, and the `threshold`: the lowest score in
        the ranking column that was kept, or `None` if `target_count` dropped no row.

    Raises:
        ValueError: If the dataset, a column or the output folder does not fit.
    """
    return on_main_process(partial(_filter_rows, config))


def _filter_rows(config: FilterConfig) -> dict:
    rules, ranking = config.rules(), config.rank_by or config.aesthetic_column
    needed = [column for columns, _, _ in rules.values() for column in columns]
    if config.target_count is not None:
        needed.append(ranking)
    rows = open_rows(config, needed)
    record = open_folder(config, fingerprint_dataset(config.dataset, config.output_dir))
    dropped = Counter(dict.fromkeys(rules, 0))
    missing, totals = Counter(dropped), Counter(seen=0, kept=0)

    if config.target_count is not None and "cutoff" not in record:
        batches = rows.select_columns(sorted(set(needed))).with_format("arrow").iter(config.batch_size)
        scores = (_numbers(table[ranking])[_passing(table, rules, Counter(), Counter())] for table in batches)
        record["cutoff"] = find_cutoff((batch[np.isfinite(batch)] for batch in scores), config.target_count)
        write_json(Path(config.output_dir, RECORD), record)
    cutoff = record.get("cutoff")

    def survivors():
        ties = cutoff["ties"] if cutoff else 0
        for table in rows.with_format("arrow").iter(config.batch_size):
            keep = _passing(table, rules, dropped, missing)
            if config.target_count is not None:
                scores = _numbers(table[ranking])
                best = np.isfinite(scores)
                missing["rank"] += int((keep & ~best).sum())
                if cutoff:
                    tied = keep & (scores == cutoff["score"])
                    best &= (scores > cutoff["score"]) | (tied & (tied.cumsum() <= ties))
                    ties -= int((tied & best).sum())
                dropped["rank"] += int((keep & ~best).sum())
                keep &= best
            totals.update(seen=len(keep), kept=int(keep.sum()))
            yield table.filter(pa.array(keep))

    for index, table in enumerate(_regroup(survivors(), config.rows_per_shard)):
        if not (path := shard_path(config.output_dir, index)).exists():
            write_shard(table, path)
    report = {**totals, "dropped": dict(dropped), "missing": dict(missing)}
    return report | {"threshold": cutoff["score"] if cutoff else None} | files_report(config.dataset)


def find_cutoff(batches: Iterable[np.ndarray], count: int) -> dict[str, float] | None:
    """The `count`-th highest of many finite scores, exactly, without holding more than about `1.5 * count` of them.

    Args:
        batches (`Iterable[np.ndarray]`): The scores.
        count (`int`): How many to keep.

    Returns:
        `dict`: That `score`, and how many `ties` with it are among the best `count`; `None` if there are at most
        `count` scores.
    """
    best = np.empty(count + max(count // 2, SPARE_SCORES))
    size, total, floor = 0, 0, -np.inf
    for scores in batches:
        total += len(scores)
        scores = scores[scores > floor]
        while len(scores):
            taken = scores[: len(best) - size]
            best[size : size + len(taken)] = taken
            size, scores = size + len(taken), scores[len(taken) :]
            if size == len(best):
                size, floor = _keep_highest(best, count)
    if total <= count:
        return None
    _, score = _keep_highest(best[:size], count)
    return {"score": float(score), "ties": int((best[:count] == score).sum())}


def _keep_highest(scores: np.ndarray, count: int) -> tuple[int, float]:
    """Move the `count` highest scores to the front; returns their number and the lowest of them."""
    scores.partition(len(scores) - count)
    scores[:count] = scores[len(scores) - count :]
    return count, scores[0]


def _passing(table: pa.Table, rules: dict, dropped: Counter, missing: Counter) -> np.ndarray:
    keep = np.ones(len(table), dtype=bool)
    for name, (columns, low, high) in rules.items():
        cells = [table[column] for column in columns]
        if name == "url":
            cells = [pc.match_substring_regex(cell, VALID_URL, ignore_case=True) for cell in cells]
        values = np.stack([_numbers(cell) for cell in cells])
        passed = ((values >= low) & (values <= high)).all(0)
        dropped[name] += int((keep & ~passed).sum())
        missing[name] += int((keep & np.isnan(values).any(0)).sum())
        keep &= passed
    return keep


def _numbers(cells: pa.ChunkedArray) -> np.ndarray:
    return pc.cast(cells, pa.float64()).to_numpy()  # null becomes NaN


def _regroup(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows, the last one with the rest."""
    rest = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        while len(rest) >= size:
            yield rest.slice(0, size)
            rest = rest.slice(size)
    if rest is not None and len(rest):
        yield rest
