"""Rows as batches: in an order that seed and step decide, with random draws of their own, without unusable rows."""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from .samples import BadRow, BadRows


# Turns a row into a sample, with a source of randomness of its own; raises BadRow.
MakeSample = Callable[[dict, random.Random], dict]


def row_random(seed: int, epoch: int, index: int | str) -> random.Random:
    """The randomness of a row depends on seed, epoch and row alone, not on workers or on where a run resumed."""
    return random.Random(f"{seed}-{epoch}-{index}")


@dataclass(eq=False)
class RowDataset(TorchDataset):
    """The rows of a map-style dataset as samples, by `(epoch, index)`.

    A row that can't be used is reported under the sample's key `bad` and the next usable one takes its place, so that
    batches stay full and every step keeps its rows.
    """

    rows: Dataset
    make: MakeSample
    seed: int
    max_bad_rows: int

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


@dataclass(eq=False)
class StreamDataset(TorchIterableDataset):
    """Micro-batches of a streaming dataset; the last one of each worker is `{"end": True}`.

    Bad rows are handled as in [`RowDataset`], so a batch always stands for `micro_batch_size` rows of the stream, and
    a resumed run can pass over rows without decoding them. Epoch and position in a worker's part seed a row's draws.
    """

    stream: IterableDataset
    make: MakeSample
    collate: Callable
    micro_batch_size: int
    seed: int
    max_bad_rows: int

    def __post_init__(self):
        self.start = torch.zeros(2, dtype=torch.long).share_memory_()  # workers that go on must see it change

    def start_at(self, epoch: int, batches: int) -> None:
        """Begin the next pass in this epoch, after `batches` batches of each worker."""
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
    """Name a streamed row by its file, else by a checksum: shuffled anew in each epoch, it has no number."""
    paths = [value["path"] for value in row.values() if isinstance(value, dict) and value.get("path")]
    return paths[0] if paths else f"with checksum {zlib.crc32(repr(row).encode()):08x}"


def collate_with_bad_rows(samples: list[dict], collate: Callable[[list[dict]], dict]) -> dict:
    """A batch of the usable samples, with all reports of unusable rows under `bad`."""
    bad = [report for sample in samples for report in sample.pop("bad")]
    usable = [sample for sample in samples if sample]
    return (collate(usable) if len(usable) == len(samples) else {}) | {"bad": bad}


@dataclass(eq=False)
class StepSampler(Sampler):
    """One process's micro-batches of `(epoch, index)`, from any step on and without end.

    Seed and epoch decide the permutation of the rows. A step takes the next `batch_size` of them, whatever the number
    of processes and micro-batches that share them; rows that do not fill a whole step wait for another epoch.

    Args:
        num_rows (`int`): Rows of the dataset.
        batch_size (`int`): Rows of one optimizer step, over all processes.
        micro_batch_size (`int`): Rows of one forward pass of one process.
        seed (`int`): Seed of the permutations.
        rank (`int`, *optional*, defaults to 0): Which process this is.
        num_processes (`int`, *optional*, defaults to 1): How many there are.
        epoch, step (`int`, *optional*, defaults to 0): Where to begin.
    """

    num_rows: int
    batch_size: int
    micro_batch_size: int
    seed: int
    rank: int = 0
    num_processes: int = 1
    epoch: int = 0
    step: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step, size = self.epoch, self.step, self.micro_batch_size
        while True:
            generator = torch.Generator().manual_seed(random.Random(f"{self.seed}-{epoch}").getrandbits(63))
            order = torch.randperm(self.num_rows, generator=generator).tolist()
            for start in range(step * self.batch_size, self.steps_per_epoch * self.batch_size, self.batch_size):
                rows = order[start : start + self.batch_size]
                for offset in range(self.rank * size, self.batch_size, self.num_processes * size):
                    yield [(epoch, index) for index in rows[offset : offset + size]]
            epoch, step = epoch + 1, 0


class StepLoader:
    """The batches of one optimizer step after the other, without end; its position is a part of checkpoints.

    A step is a list of micro-batches, which this process handles one by one. The position is an epoch and the steps
    taken in it, the same on every process. A streamed epoch ends with the first worker of any process that runs out of
    rows; to resume in the middle of it, its rows are read again up to that place, though not decoded.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): The training rows.
        make (`Callable[[dict, random.Random], dict]`): Turns a row into a sample; raises
            [`~llamagen_hf.data.samples.BadRow`] for a row that can't be used.
        collate (`Callable[[list[dict]], dict]`): Turns samples into a batch.
        batch_size (`int`): Rows of one optimizer step, over all processes.
        micro_batch_size (`int`): Rows of one forward pass of one process; must divide the batch.
        bad_rows ([`BadRows`]): Counts rows that can't be used and stops the run when there are too many.
        seed (`int`): Seed of the order and of what is drawn for each row.
        num_workers (`int`, *optional*, defaults to 0): Processes that make samples beside each training process.
        shuffle_buffer_size (`int`, *optional*, defaults to 10000): Rows among which a stream is shuffled.
        accelerator ([`~accelerate.Accelerator`]): Says which process this is.

    Raises:
        ValueError: The rows do not fill one step, or the sizes do not divide.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        make: MakeSample,
        collate: Callable,
        batch_size: int,
        micro_batch_size: int,
        bad_rows: BadRows,
        seed: int,
        accelerator,
        num_workers: int = 0,
        shuffle_buffer_size: int = 10_000,
    ):
        self.rows = rows
        self.accelerator = accelerator
        self.bad_rows = bad_rows
        self.is_stream = isinstance(rows, IterableDataset)
        rank, processes = accelerator.process_index, accelerator.num_processes
        if batch_size % (micro_batch_size * processes):
            raise ValueError(
                f"A step of {batch_size} rows can't be shared out to {processes} process(es) in micro-batches of "
                f"{micro_batch_size}; batch_size must be a multiple of both together."
            )
        self.micro_batches = batch_size // (micro_batch_size * processes)
        # Of its own: starting workers must not take a number from dropout's random state.
        options = {"num_workers": num_workers, "generator": torch.Generator()}
        if self.is_stream:
            stream = split_dataset_by_node(
                rows.shuffle(seed=seed, buffer_size=shuffle_buffer_size), rank=rank, world_size=processes
            )
            if num_workers := min(num_workers, stream.num_shards):  # more would have nothing to read
                # Arrow's threads do not survive a fork, and starting anew takes too long for each epoch.
                options |= {"multiprocessing_context": "spawn", "persistent_workers": True}
            options["num_workers"] = num_workers
            self.dataset = StreamDataset(stream, make, collate, micro_batch_size, seed, bad_rows.limit)
            self.loader = DataLoader(self.dataset, batch_size=None, **options)
        else:
            if len(rows) < batch_size:
                raise ValueError(f"{len(rows)} rows do not fill one batch of {batch_size}.")
            self.sampler = StepSampler(len(rows), batch_size, micro_batch_size, seed, rank, processes)
            self.loader = DataLoader(
                RowDataset(rows, make, seed, bad_rows.limit),
                batch_sampler=self.sampler,
                collate_fn=partial(collate_with_bad_rows, collate=collate),
                **options,
            )
        self.epoch = self.step = 0
        self.identity = {"batch_size": batch_size, "seed": seed}  # without which a position means nothing
        if not self.is_stream:
            self.identity["rows"] = len(rows)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the rows; raises a `ValueError` for a stream."""
        if self.is_stream:
            raise ValueError("A stream has no known length; set max_train_steps in place of num_train_epochs.")
        return self.sampler.steps_per_epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step} | self.identity

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Move to a saved position; raises a `ValueError` if it is one in other rows or in steps of another size."""
        for name, value in self.identity.items():
            if state.get(name) != value:
                raise ValueError(f"its run had {name} {state.get(name)}, not {value}")
        self.epoch, self.step = state["epoch"], state["step"]

    def restart(self) -> None:
        """Go back to the first step."""
        self.epoch = self.step = 0

    def __iter__(self) -> Iterator[list[dict]]:
        while True:
            batches = self._stream() if self.is_stream else self._ordered()
            started_empty = self.step == 0
            while micro_batches := self._next(batches):
                self.step += 1  # before the step is handed out: a checkpoint after it must point to the next one
                if not self.is_stream and self.step == self.sampler.steps_per_epoch:
                    self.epoch, self.step = self.epoch + 1, 0
                yield micro_batches
            if started_empty and self.step == 0:
                raise ValueError("The streamed rows do not fill one batch on each process and worker.")
            self.epoch, self.step = self.epoch + 1, 0

    def _ordered(self) -> Iterator[dict]:
        self.sampler.epoch, self.sampler.step = self.epoch, self.step
        return iter(self.loader)

    def _stream(self) -> Iterator[dict]:
        # The loader takes a batch from each worker in turn, so all but the first few have handed out equally many.
        each, extra = divmod(self.step * self.micro_batches, max(1, self.loader.num_workers))
        self.dataset.start_at(self.epoch, each)
        return islice(self.loader, extra, None)

    def _next(self, batches: Iterator[dict]) -> list[dict]:
        """The micro-batches of one step; empty if the epoch has no more."""
        taken, ended = [], False
        for batch in islice(batches, self.micro_batches):
            for index, reason in batch.pop("bad"):
                self.bad_rows.add(index, reason)
            ended = ended or batch.pop("end", False)
            taken.append(batch)
        if self.is_stream and self.accelerator.num_processes > 1:
            flag = torch.tensor(float(ended), device=self.accelerator.device)
            ended = self.accelerator.reduce(flag).item() > 0
        return [] if ended else taken


def batches_once(
    rows: Dataset | IterableDataset,
    make: MakeSample,
    collate: Callable,
    batch_size: int,
    rank: int = 0,
    num_processes: int = 1,
) -> Iterator[dict]:
    """Go once through one process's part of a split: batches in the order of the rows, without unusable ones."""
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
