"""What a run trains on: the order in which it sees its rows, and the loader that follows it from any step on."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Sampler

from .loader import MakeSample, RowDataset, StreamDataset, collate_with_bad_rows
from .samples import BadRows


class RunOrder(Sampler):
    """One process's micro-batches of `(epoch, index)`, from any step of the run on and without end.

    An epoch is a permutation that seed and epoch decide. A step takes the next `batch_size` rows of it, whatever the
    number of processes and micro-batches that share them; rows that fill no whole step wait for another epoch.

    Args:
        num_rows (`int`): Rows of the dataset.
        batch_size (`int`): Rows of one optimizer step, over all processes.
        micro_batch_size (`int`): Rows of one forward pass of one process.
        seed (`int`): Seed of the permutations.
        rank (`int`, *optional*, defaults to 0): Which process this is.
        num_processes (`int`, *optional*, defaults to 1): How many there are.
    """

    def __init__(
        self, num_rows: int, batch_size: int, micro_batch_size: int, seed: int, rank: int = 0, num_processes: int = 1
    ):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.num_processes = num_processes
        self.epoch = self.step = 0

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


class Feed:
    """Batches for one optimizer step after the other; a part of a run's checkpoints.

    A step's worth is a list of micro-batches, which this process handles one by one. The position is an epoch and the
    steps taken in it, the same on every process. A streamed epoch ends with the first worker of any process that runs
    out of rows; to go on in the middle of it, its rows are read again up to that place, though not decoded.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): What to train on.
        make (`Callable[[dict, random.Random], dict]`): Row and randomness to a sample; raises
            [`~llamagen_hf.data.samples.BadRow`].
        collate (`Callable[[list[dict]], dict]`): Samples to a batch.
        batch_size (`int`): Rows of one optimizer step, over all processes.
        micro_batch_size (`int`): Rows of one forward pass of one process; must divide the batch.
        bad_rows ([`BadRows`]): Counts rows that can't be used and stops the run when there are too many.
        seed (`int`): Seed of the order and of what is drawn for each row.
        num_workers (`int`, *optional*, defaults to 0): Processes that make samples beside each training process.
        shuffle_buffer_size (`int`, *optional*, defaults to 10000): Rows among which a stream is shuffled.
        accelerator ([`~accelerate.Accelerator`]): Says which process this is.

    Raises:
        ValueError: If the rows do not fill one step, or the sizes do not divide.
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
            self.order = RunOrder(len(rows), batch_size, micro_batch_size, seed, rank, processes)
            self.loader = DataLoader(
                RowDataset(rows, make, seed, bad_rows.limit),
                batch_sampler=self.order,
                collate_fn=partial(collate_with_bad_rows, collate=collate),
                **options,
            )
        self.epoch = self.step = 0
        self.identity = {"batch_size": batch_size, "seed": seed}  # without which a position means nothing
        if not self.is_stream:
            self.identity["rows"] = len(rows)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step} | self.identity

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at a saved position; a `ValueError` if it is one in other rows or in steps of another size."""
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
                if not self.is_stream and self.step == self.order.steps_per_epoch:
                    self.epoch, self.step = self.epoch + 1, 0
                yield micro_batches
            if started_empty and self.step == 0:
                raise ValueError("The streamed rows do not fill one batch on each process and worker.")
            self.epoch, self.step = self.epoch + 1, 0

    def _ordered(self) -> Iterator[dict]:
        self.order.epoch, self.order.step = self.epoch, self.step
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
