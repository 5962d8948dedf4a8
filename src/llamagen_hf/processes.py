"""The processes that share the work of a stage."""

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, parse_flag_from_env


logger = get_logger(__name__)
Result = TypeVar("Result")

# The others wait while one finishes its last shard, measures 50,000 images, or writes a large checkpoint.
LONGEST_WAIT = timedelta(days=30)


def this_process() -> PartialState:
    """The index of this process, the number of processes, and this process's device.

    Every stage calls this before it uses Accelerate, since the first call decides for the whole process: by itself,
    Accelerate does not join processes on a machine without accelerators, and each would think that it is alone.

    Raises:
        ValueError: If several processes were launched and can't be joined.
    """
    is_first = not PartialState._shared_state
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)  # only the arguments of the first call count
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if state.num_processes < launched:
        raise ValueError(
            f"{launched} processes were launched, but Accelerate can't join them on {state.device}; set "
            "ACCELERATE_USE_CPU=1 to run them on the CPU, or launch one."
        )
    if is_first:
        logger.info(f"{state.num_processes} process(es), the first one on {state.device}")
    return state


def on_main_process(compute: Callable[[], Result]) -> Result:
    """Call a function on the main process only, while the others wait.

    Args:
        compute (`Callable`): The function.

    Returns:
        Its result, on all processes.

    Raises:
        ValueError: On all processes, if the function raises a `ValueError` or an `OSError`. A single process raises
            the error itself.
    """
    state, result, message = this_process(), None, None
    if state.is_main_process:
        try:
            result = compute()
        except (ValueError, OSError) as error:
            if state.num_processes == 1:
                raise
            message = str(error)
    result, message = broadcast_object_list([result, message])
    if message is not None:
        raise ValueError(message)
    return result


def leave_processes() -> None:
    """Leave the process group at the end of a command.

    A wrapped model that outlives its process group frees it in C++ while it holds Python's lock, and waits forever if
    one of the group's threads needs that lock. So remaining models are collected first.
    """
    gc.collect()
    this_process().destroy_process_group()
