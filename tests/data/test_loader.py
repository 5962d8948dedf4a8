"""The order of rows: the same for any number of processes and workers, and from any step on."""

import random
from itertools import islice, product
from types import SimpleNamespace

import pytest


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.data.loader import StepLoader, StepSampler, batches_once  # noqa: E402
from llamagen_hf.data.samples import BadRow, BadRows  # noqa: E402


ROWS = 23


def make(row: dict, rng: random.Random) -> dict:
    if row["x"] in (7, 8):
        raise BadRow("no image")
    return {"x": row["x"], "draw": rng.random()}


def collate(samples: list[dict]) -> dict:
    return {"x": [sample["x"] for sample in samples], "draw": [sample["draw"] for sample in samples]}


def map_rows():
    return datasets.Dataset.from_dict({"x": list(range(ROWS))})


def stream_rows(shards: int = 4):
    return map_rows().to_iterable_dataset(num_shards=shards)


def loader_of(rows, limit=2, batch_size=4, micro_batch_size=2, num_workers=0, rank=0, num_processes=1, seed=0):
    accelerator = SimpleNamespace(process_index=rank, num_processes=num_processes, device="cpu")
    return StepLoader(
        rows, make, collate, batch_size, micro_batch_size, BadRows(limit), seed, accelerator, num_workers, 8
    )


def drawn(loader: StepLoader, steps: int) -> list:
    return [[batch["x"] for batch in step] for step in islice(loader, steps)]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    order = StepSampler(ROWS, batch_size=4, micro_batch_size=2, seed=0)
    keys = [key for batch in islice(order, 20) for key in batch]
    for epoch in (0, 1):
        indices = [index for e, index in keys if e == epoch]
        assert len(indices) == len(set(indices)) == 20  # three of 23 do not fill a step
    assert [index for e, index in keys if e == 0] != [index for e, index in keys if e == 1]
    other = StepSampler(ROWS, batch_size=4, micro_batch_size=2, seed=1)
    assert [key for batch in islice(other, 20) for key in batch] != keys


@pytest.mark.parametrize("processes, micro", [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_has_the_same_rows_however_it_is_shared_out(processes, micro):
    expected = [sorted(sum(step, [])) for step in drawn(loader_of(map_rows()), 7)]
    parts = [loader_of(map_rows(), micro_batch_size=micro, rank=r, num_processes=processes) for r in range(processes)]
    steps = zip(*(drawn(part, 7) for part in parts), strict=True)
    assert [sorted(x for part in step for batch in part for x in batch) for step in steps] == expected


@pytest.mark.parametrize(
    "rows, workers, stop",
    [
        *product([map_rows], [0, 2], [1, 3, 6, 9]),
        *product([stream_rows], [0], [1, 3, 6, 9]),
        # Workers of a stream start from nothing and import everything.
        pytest.param(stream_rows, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_loader_goes_on_where_it_stopped(rows, workers, stop):
    whole = loader_of(rows(), num_workers=workers)
    expected = [step for step in islice(whole, 12)]
    first = loader_of(rows(), num_workers=workers)
    list(islice(first, stop))
    second = loader_of(rows(), num_workers=workers)
    second.load_state_dict(first.state_dict())
    assert [step for step in islice(second, 12 - stop)] == expected[stop:]
    assert len({str(step) for step in expected}) == 12


def test_workers_change_no_draw():
    assert list(islice(loader_of(map_rows()), 8)) == list(islice(loader_of(map_rows(), num_workers=2), 8))


def test_two_processes_stream_different_rows():
    parts = [loader_of(stream_rows(), rank=rank, num_processes=2, micro_batch_size=1) for rank in (0, 1)]
    seen = []
    for part in parts:
        part.accelerator.reduce = lambda flag: flag  # two processes that never see the end at the same step
        part.dataset.make = lambda row, rng: {"x": row["x"], "draw": 0}
        seen.append({x for step in drawn(part, 4) for batch in step for x in batch})
    assert not seen[0] & seen[1] and all(len(rows) == 8 for rows in seen)


@pytest.mark.parametrize("rows", [map_rows, stream_rows])
def test_bad_rows_are_replaced_counted_and_limited(rows):
    loader = loader_of(rows())
    steps = drawn(loader, 30)
    assert all(len(batch) == 2 and not {7, 8} & set(batch) for step in steps for batch in step)
    assert loader.bad_rows.report() == {"no image": len(loader.bad_rows)}
    assert len(loader.bad_rows) == 2  # each counts once, however often it comes up
    with pytest.raises(ValueError, match=r"1 row.s. can't be used, more than max_bad_rows \(0\) allows"):
        drawn(loader_of(rows(), limit=0), 30)


def test_wrong_sizes_are_one_sentence():
    with pytest.raises(ValueError, match="23 rows do not fill one batch of 24"):
        loader_of(map_rows(), batch_size=24)
    with pytest.raises(ValueError, match="A step of 4 rows can't be shared out to 2 process"):
        loader_of(map_rows(), num_processes=2, micro_batch_size=4)
    with pytest.raises(ValueError, match="streamed rows do not fill one batch"):
        drawn(loader_of(stream_rows(), batch_size=24, micro_batch_size=24), 1)


def test_test_batches_come_once_in_order_without_bad_rows():
    batches = list(batches_once(map_rows(), make, collate, 5))
    assert [len(batch["x"]) for batch in batches] == [5, 5, 5, 5, 1]
    assert [x for batch in batches for x in batch["x"]] == [x for x in range(ROWS) if x not in (7, 8)]
    parts = [list(batches_once(map_rows(), make, collate, 5, rank, 3)) for rank in range(3)]
    assert sorted(x for part in parts for batch in part for x in batch["x"]) == [
        x for x in range(ROWS) if x not in (7, 8)
    ]
