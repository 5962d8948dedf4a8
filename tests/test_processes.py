"""Which process a stage takes itself for; several of them are in the tests that launch."""

import pytest
import torch
from accelerate.state import AcceleratorState

from llamagen_hf.processes import on_main_process, this_process


@pytest.fixture
def launched(monkeypatch):
    """What a launcher tells a process that is started alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("ACCELERATE_USE_CPU", "LOCAL_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("has_accelerator, flag", [(True, "true"), (False, None)])
def test_the_cpu_is_taken_when_asked_for_or_alone(launched, has_accelerator, flag):
    launched.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    if flag is not None:
        launched.setenv("ACCELERATE_USE_CPU", flag)
    process = this_process()
    assert process._cpu and process.device.type == "cpu"
    assert (process.num_processes, process.process_index) == (1, 0)
    assert on_main_process(lambda: {"rows": 3}) == {"rows": 3}


def test_an_accelerator_is_taken_where_there_is_one(launched):
    launched.setattr(torch.accelerator, "is_available", lambda: True)
    assert not this_process()._cpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes on GPUs are joined")
def test_processes_that_are_not_joined_are_refused_in_words(launched):
    launched.setattr(torch.accelerator, "is_available", lambda: True)  # such as Apple's
    launched.setattr(torch.distributed, "init_process_group", lambda **_: None)  # the other one will not come
    launched.setenv("LOCAL_RANK", "0")
    launched.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched.*set ACCELERATE_USE_CPU=1"):
        this_process()
