"""What compiling takes: a compiler and headers for CPUs, and a folder where the next process finds the code."""

import os
import sysconfig
from pathlib import Path

import torch
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


def missing_for_cpu() -> str | None:
    """What torch lacks here to compile for a CPU, with what to do; `None` if there is all of it."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        return "a C++ compiler: install g++, or name another one in the variable CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers: install them (python3-dev)"
    return None


def check_compiler(device: torch.device) -> None:
    """Raise a `ValueError` if code for a device can't be compiled, since that is a CPU and something is missing."""
    missing = missing_for_cpu() if device.type == "cpu" else None
    if missing is not None:
        raise ValueError(f"Compiling for a CPU takes {missing}, or go on without compiling.")
