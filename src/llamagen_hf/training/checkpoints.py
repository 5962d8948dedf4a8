"""Training states on disk: complete or absent, newest first found."""

import re
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger


logger = get_logger(__name__)


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, total_limit: int) -> None:
    """Write the state of everything that `accelerator` prepared to `folder/step-N`, then drop the oldest."""
    accelerator.wait_for_everyone()
    target, partial = folder / f"step-{step:08d}", folder / f"partial-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(partial)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        partial.rename(target)
        for old in _checkpoints(folder)[:-total_limit]:
            shutil.rmtree(old)


def resume(accelerator: Accelerator, folder: Path) -> int:
    """Load the newest complete checkpoint of `folder` and return its step, 0 if there is none."""
    found = _checkpoints(folder)
    if not found:
        return 0
    accelerator.load_state(found[-1])
    logger.info(f"Resumed from {found[-1]}.")
    return int(found[-1].name.removeprefix("step-"))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))
