"""Where compiled code is kept, so that the next process needs not compile it again."""

import os
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir


VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch reads it, and sets it as soon as it compiles


def compiled_code_folder() -> Path:
    """The folder of compiled code in the user's cache folder, which `XDG_CACHE_HOME` names; by default `~/.cache`.

    Raises:
        RuntimeError: If the user has no home.
    """
    parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent) / "llamagen_hf" / "compiled"


def keep_compiled_code() -> None:
    """Let `torch.compile` keep its code in the user's cache folder, where it outlives a restart of the machine.

    By default it lies in a temporary folder. `TORCHINDUCTOR_CACHE_DIR` names another one. Nothing happens if the
    folder can't be made.
    """
    # torch sets its default as soon as anything asks for the folder, as importing torchao does.
    if os.environ.get(VARIABLE) not in (None, default_cache_dir()):
        return
    try:
        folder = compiled_code_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return
    if os.access(folder, os.W_OK):
        os.environ[VARIABLE] = str(folder)
