"""Packages of compiled code: a module with its weights frozen in, kept for the next process."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor
from torch._inductor.runtime.cache_dir_utils import cache_dir

from .compilation import keep_compiled_code


# Options of inductor: try several kernels for each shape, and do not print what each of them took.
FASTEST_KERNELS = {"max_autotune": True, "autotune_num_choices_displayed": 0}

MAX_BYTES = 4 * 2**30  # of all packages, each of which holds a copy of its weights


@torch.inference_mode(False)
@torch.no_grad()
def load_package(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable[..., torch.Tensor]:
    """Compile a module for the CPU, or load what an earlier process has compiled.

    The weights are constants of the compiled code, and the fastest of several kernels are chosen, which takes a minute
    or so. AOTInductor keeps it in a file, in the folder of
    [`~llamagen_hf.loading.compilation.keep_compiled_code`]. A process with the same graph, weights, torch, number of
    threads and processor loads that file. When all files together exceed 4 GB, those that were not used for longest
    are deleted.

    Args:
        module (`torch.nn.Module`): In evaluation mode. It may write to its inputs.
        inputs (`tuple[torch.Tensor, ...]`): Its inputs; those of later calls must have the same shapes.

    Returns:
        `Callable[..., torch.Tensor]`: What computes the module's output from such inputs.

    Raises:
        Exception: Whatever `torch.export` and the compiler raise for a module that they can't compile.
    """
    keep_compiled_code()
    folder = Path(cache_dir()) / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    exported = torch.export.export(module, inputs, strict=False)
    path = folder / f"{_key(exported)}.pt2"
    if path.exists():
        os.utime(path)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = torch._inductor.aoti_compile_and_package(
                exported,
                package_path=os.path.join(unfinished, path.name),
                inductor_configs={"freezing": True, **FASTEST_KERNELS},
            )
            os.replace(made, path)
        _delete_oldest(folder)
    return torch._inductor.aoti_load_package(path)


def _key(exported: torch.export.ExportedProgram) -> str:
    """A hash of all that compiled code depends on."""
    graphs = [part.graph for part in exported.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    inputs = [node.meta["val"] for node in graphs[0].nodes if node.op == "placeholder"]
    parts = [torch.__version__, torch.get_num_threads(), sorted(torch.cpu.get_capabilities().items())]
    parts += [*graphs, [(each.shape, each.stride(), each.dtype) for each in inputs]]
    digest = hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=16)
    for name, tensor in sorted({**exported.state_dict, **exported.constants}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _delete_oldest(folder: Path) -> None:
    """Delete packages until the others have at most `MAX_BYTES`. The newest stays in any case."""
    newest_first = sorted(folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for index, path in enumerate(newest_first):
        total += path.stat().st_size
        if index and total > MAX_BYTES:
            path.unlink(missing_ok=True)
