"""Training states on disk, complete or absent."""

import json
import re
import shutil
import textwrap
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError

from ..data.fingerprint import INPUTS_FILE


logger = get_logger(__name__)

# The weights beside the file by which loading recognizes a result; a pipeline's file, model_index.json, lists folders.
WEIGHTS = {
    "config.json": ("diffusion_pytorch_model*.safetensors*", "model*.safetensors*"),  # diffusers, transformers
    "adapter_config.json": ("adapter_model*.safetensors*",),
}


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, total_limit: int) -> None:
    """Write the state of everything that `accelerator` has prepared to `folder/step-N`, then remove the oldest.

    A checkpoint has another name until it is complete, and older ones are removed after that, so one of them is always
    complete.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Its models, optimizers and registered objects are saved.
        folder (`Path`): The folder of the checkpoints.
        step (`int`): Optimizer steps that were taken.
        total_limit (`int`): Checkpoints to keep, at least 1.

    Raises:
        OSError: The state can't be written. Older checkpoints stay as they are.
    """
    target, partial = folder / f"step-{step:08d}", folder / f"partial-{step:08d}"
    if accelerator.is_main_process:
        for leftover in folder.glob("partial-*"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors have errors of their own
        raise OSError(
            f"The checkpoint of step {step} can't be written to {folder}: {error}. Training can resume from "
            f"{latest_checkpoint(folder) or 'its start'} once there is room."
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(target)
        for old in _checkpoints(folder)[:-total_limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path) -> int:
    """Load the newest complete checkpoint of `folder` and return its step, 0 if there is none.

    Raises:
        ValueError: The checkpoint belongs to another recipe.
    """
    for partial in sorted(folder.glob("partial-*")):
        logger.warning(f"Ignoring {partial}: the run stopped while it was being written.")
    newest = latest_checkpoint(folder)
    if newest is None:
        return 0
    try:
        accelerator.load_state(str(newest))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"The checkpoint {newest} belongs to another recipe ({reason}); go on with that one, choose another "
            "output_dir, or start over with --overwrite."
        ) from error
    logger.info(f"Resumed from {newest}.")
    return int(newest.name.removeprefix("step-"))


def remove_run(folder: Path, results: Iterable[str]) -> None:
    """Remove what a training wrote to `folder`, and nothing else: result, facts, log, images, checkpoints.

    If it is killed, the checkpoints that are left are complete, and the record of their inputs is still there.

    Args:
        folder (`Path`): The run's folder.
        results (`Iterable[str]`): The files by which loading recognizes the results that this training may have
            written.
    """
    for name in results:
        if not (folder / name).is_file():
            continue
        pieces = [path for pattern in WEIGHTS.get(name, ()) for path in folder.glob(pattern)]
        if name not in WEIGHTS:
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            pieces = [folder / part for part, kind in index.items() if isinstance(kind, list) and kind[0] is not None]
        (folder / name).unlink()
        for path in pieces:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (folder / "training.json", folder / "log.jsonl", *folder.glob("samples/step-*.png")):
        path.unlink(missing_ok=True)
    for path in _checkpoints(folder / "checkpoints"):
        partial = path.with_name(path.name.replace("step", "partial"))
        shutil.rmtree(path.rename(partial))
    (folder / INPUTS_FILE).unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, if any."""
    return next(reversed(_checkpoints(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))
