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
    newest = latest_checkpoint(folder)
    if newest is None:
        return 0
    accelerator.load_state(newest)
    logger.info(f"Resumed from {newest}.")
    return int(newest.name.removeprefix("step-"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, if any."""
    return next(reversed(_checkpoints(folder)), None)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))
