"""Rows made into samples, with random draws of their own and without those that can't be used."""

import random
import zlib
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from .samples import BadRow


# A row and its own source of randomness to a sample; raises BadRow.
MakeSample = Callable[[dict, random.Random], dict]


def row_random(seed: int, epoch: int, index: int | str) -> random.Random:
    """What is drawn for a row depends on seed, epoch and row alone, not on workers or on where a run resumed."""
    return random.Random(f"{seed}-{epoch}-{index}")


class RowDataset(TorchDataset):
    """Rows of a map-style dataset as samples, by `(epoch, index)`.

    A row that can't be used is reported under the sample's key `bad` and the next usable one takes its place, so that
    batches stay full and every step keeps its rows.
    """

    def __init__(self, rows: Dataset, make: MakeSample, seed: int, max_bad_rows: int):
        self.rows = rows
        self.make = make
        self.seed = seed
        self.max_bad_rows = max_bad_rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        bad = []
        while len(bad) <= self.max_bad_rows:
            row = (index + len(bad)) % len(self.rows)
            try:
                return self.make(self.rows[row], row_random(self.seed, epoch, index)) | {"bad": bad}
            except BadRow as error:
                bad.append((row, str(error)))
        return {"bad": bad}  # too many: the process that counts them will stop the run


class StreamDataset(TorchIterableDataset):
    """Micro-batches of a streaming dataset; the last one of each worker is `{"end": True}`.

    Bad rows are handled as in [`RowDataset`], so a batch always stands for `micro_batch_size` rows of the stream, and
    a resumed run can pass over rows without decoding them. Epoch and position in a worker's part seed a row's draws.
    """

    def __init__(
        self,
        stream: IterableDataset,
        make: MakeSample,
        collate: Callable,
        micro_batch_size: int,
        seed: int,
        max_bad_rows: int,
    ):
        self.stream = stream
        self.make = make
        self.collate = collate
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.max_bad_rows = max_bad_rows
        self.start = torch.zeros(2, dtype=torch.long).share_memory_()  # workers that go on must see it change

    def start_at(self, epoch: int, batches: int) -> None:
        """Begin the next pass in this epoch, after so many batches of each worker."""
        self.start[:] = torch.tensor([epoch, batches])
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        part = 0 if worker is None else worker.id
        bad, samples, waiting = [], [], 0
        epoch, batches = self.start.tolist()
        first = batches * self.micro_batch_size
        for position, row in enumerate(islice(self.stream, first, None), start=first):
            waiting += 1
            try:
                sample = self.make(row, row_random(self.seed, epoch, f"{part}.{position}"))
            except BadRow as error:
                bad.append((name_row(row), str(error)))
                if len(bad) > self.max_bad_rows:
                    break
                continue
            samples.extend([sample] * waiting)
            waiting = 0
            while len(samples) >= self.micro_batch_size:
                batch = [sample | {"bad": []} for sample in samples[: self.micro_batch_size]]
                batch[0]["bad"], bad = bad, []
                yield collate_with_bad_rows(batch, self.collate)
                del samples[: self.micro_batch_size]
        yield {"end": True, "bad": bad}


def name_row(row: dict) -> str:
    """A streamed row by its file, else by a checksum: shuffled anew in each epoch, it has no number."""
    paths = [value["path"] for value in row.values() if isinstance(value, dict) and value.get("path")]
    return paths[0] if paths else f"with checksum {zlib.crc32(repr(row).encode()):08x}"


def collate_with_bad_rows(samples: list[dict], collate: Callable[[list[dict]], dict]) -> dict:
    """A batch of the usable samples, with all reports of unusable rows under `bad`."""
    bad = [report for sample in samples for report in sample.pop("bad")]
    usable = [sample for sample in samples if sample]
    return (collate(usable) if len(usable) == len(samples) else {}) | {"bad": bad}


def batches_once(
    rows: Dataset | IterableDataset,
    make: MakeSample,
    collate: Callable,
    batch_size: int,
    rank: int = 0,
    num_processes: int = 1,
) -> Iterator[dict]:
    """Batches of one process's part of a split: once through, in order, without rows that can't be used."""
    samples = []
    for index, row in enumerate(split_dataset_by_node(rows, rank=rank, world_size=num_processes)):
        try:
            samples.append(make(row, row_random(0, 0, index)))
        except BadRow:
            continue
        if len(samples) == batch_size:
            yield collate(samples)
            samples = []
    if samples:
        yield collate(samples)
