"""The components of a pipeline, also of pipelines that are its components."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline


def list_components(pipe: DiffusionPipeline, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and component of all that is in a pipeline, at any depth: `"unet"`, or `"upsampler.unet"` in a cascade.

    Components that were left out are `None`.
    """
    for name, component in pipe.components.items():
        if isinstance(component, DiffusionPipeline):
            yield from list_components(component, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", component


def component_folders(folder: Path, index: dict) -> list[str]:
    """The folders of a saved pipeline, below its own: `"unet"`, or `"upsampler"` and `"upsampler/unet"`.

    Args:
        folder (`Path`): The folder of the pipeline.
        index (`dict`): What its `model_index.json` holds.
    """
    # A list names library and class of a component; both are null if it was left out.
    own = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    found = []
    for name in own:
        found.append(name)
        if (folder / name / DiffusionPipeline.config_name).is_file():
            inner = DiffusionPipeline.load_config(folder / name)
            found += [f"{name}/{below}" for below in component_folders(folder / name, inner)]
    return found
