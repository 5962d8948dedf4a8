"""Scripts in several processes on the CPU, as on a machine without accelerators and without a word to Accelerate.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/launching.py SCRIPT ARGUMENTS...
"""

import gc
import os
import runpy
import subprocess
import sys


def launch(script, *args, processes: int = 2, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run a script in so many processes, each of which checks that it was one of them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes,
               __file__, script, *args]  # fmt: skip
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-5000:]
    return result


def run() -> None:
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
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert PartialState._shared_state, "the script did not ask which process it is"
    assert PartialState().num_processes == int(os.environ["WORLD_SIZE"])
    assert not torch.distributed.is_initialized(), "the script did not leave its processes"


if __name__ == "__main__":
    run()
