"""Checks of saved weights that the libraries' loaders leave out: damaged files, and weights that are not there."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


def read_weight_names(folder: Path) -> dict[str, set[str]]:
    """Names of the saved weights of each component, from the headers of its safetensors files.

    Raises:
        OSError: In one sentence, if a file is cut off or otherwise damaged.
    """
    names: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names.setdefault(path.parent.name, set()).update(file.keys())
        except (SafetensorError, OSError) as error:
            raise OSError(f"A file of the checkpoint is damaged: {path.parent.name}/{path.name}.") from error
    return names


def find_missing_weights(component: torch.nn.Module, saved_names: set[str]) -> list[str]:
    """Names of parameters that were not saved, under their own name or that of a parameter tied to them."""
    names: dict[int, list[str]] = {}
    for name, parameter in component.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(aliases[0] for aliases in names.values() if not saved_names & set(aliases))
