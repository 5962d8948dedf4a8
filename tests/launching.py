"""Scripts in several processes on the CPU, as on a machine without accelerators and without a word to Accelerate.

The processes are forked from one that has imported everything, since imports take seconds of each. They find each
other as those of `torch.distributed.run` do, by variables of the environment; `torchrun` really starts that:

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/launching.py SCRIPT ARGUMENTS...
"""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "llamagen_hf.diffusion.training.classifier_trainer",
        "llamagen_hf.diffusion.training.diffusion_trainer",
        "llamagen_hf.llamagen.training.generator_trainer",
        "llamagen_hf.llamagen.training.vq_trainer",
        "llamagen_hf.unclip.training.clip_trainer",
        "llamagen_hf.unclip.training.prior_trainer",
    ]
)


def launch(script, *args, processes: int = 2, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run a script in so many processes, each of which checks that it was one of them."""
    words = [str(word) for word in (script, *args)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        ranks = [
            CONTEXT.Process(target=run_rank, args=(rank, processes, port, folder, words)) for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        exit_codes = wait_for(ranks, timeout)
        stdout, stderr = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    assert not any(exit_codes), f"exit codes {exit_codes}: {stderr[-5000:]}"
    return subprocess.CompletedProcess(words, 0, stdout, stderr)


def wait_for(ranks: list[multiprocessing.Process], timeout: int) -> list[int]:
    """Exit codes of the processes. Once one fails, the others, which would wait for it, are killed."""
    end, running = time.monotonic() + timeout, list(ranks)
    while running:
        ended = wait([rank.sentinel for rank in running], max(end - time.monotonic(), 0))
        for rank in [rank for rank in running if rank.sentinel in ended]:
            rank.join()
            running.remove(rank)
        if not ended or any(rank.exitcode for rank in ranks if rank not in running):
            for rank in running:
                rank.kill()
                rank.join()
            break
    return [rank.exitcode for rank in ranks]


def run_rank(rank: int, processes: int, port: int, folder: str, words: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    run(words)


def torchrun(script, *args, processes: int = 2, timeout: int = 300) -> subprocess.CompletedProcess:
    """The same by PyTorch's own launcher, and in the environment as it is now."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes,
               __file__, script, *args]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-5000:]
    return result


def run(words: list[str]) -> None:
    import torch
    from accelerate import PartialState
    from torch.nn.parallel import DistributedDataParallel

    from llamagen_hf.processes import LONGEST_WAIT

    destroy = torch.distributed.destroy_process_group

    def destroy_checked(*args):
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout == LONGEST_WAIT
        # One that is left frees the group last, and then may wait forever for the group's own threads.
        assert not any(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
        destroy(*args)

    torch.distributed.destroy_process_group = destroy_checked
    sys.argv = words
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert PartialState._shared_state, "the script did not ask which process it is"
    assert PartialState().num_processes == int(os.environ["WORLD_SIZE"])
    assert not torch.distributed.is_initialized(), "the script did not leave its processes"


if __name__ == "__main__":
    run(sys.argv[1:])
