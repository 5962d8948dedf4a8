"""Where compiled code is kept, so that the next process needs not compile it again."""

import os
from pathlib import Path


def keep_compiled_code() -> None:
    """Let `torch.compile` keep its code in the user's cache folder, where it outlives a restart of the machine.

    By default it lies in a temporary folder. `TORCHINDUCTOR_CACHE_DIR` names another one, and what this process has
    compiled before stays where it is. Nothing happens if the folder can't be made.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:  # torch sets it as soon as it compiles
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamagen_hf" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # of a user without a home
        return
    if os.access(folder, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
