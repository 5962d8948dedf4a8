"""The families of generators there are. Rooms that all of them share know them through this table alone."""

import json
from dataclasses import dataclass
from importlib import import_module

from diffusers import DiffusionPipeline

from .loading.checkpoint import CheckpointLoaderMixin


@dataclass(frozen=True)
class Family:
    """A pipeline of this package, and what is said of it where it is published.

    Args:
        pipeline (`str`): Name of its class, in `llamagen_hf`.
        name (`str`): What its paper calls it.
        paper (`str`): Authors and year.
        arxiv (`str`): Number of its paper.
        tags (`tuple[str, ...]`): On the Hub, beside the task's.
    """

    pipeline: str
    name: str
    paper: str
    arxiv: str
    tags: tuple[str, ...]

    @property
    def pipeline_class(self) -> type[DiffusionPipeline]:
        """The class itself, imported when it is asked for: this table is below all families."""
        return own_class(self.pipeline)


FAMILIES = (
    Family(
        pipeline="AutoregressiveImagePipeline",
        name="LlamaGen",
        paper="Sun et al. 2024",
        arxiv="2406.06525",
        tags=("llamagen", "autoregressive"),
    ),
)


def own_class(name: str) -> type | None:
    """A public class of this package by its name, `None` if there is none of that name."""
    return getattr(import_module("llamagen_hf"), name, None)


def find_family(pipeline: str | None) -> Family | None:
    """The family of a pipeline by the name of its class, as `model_index.json` has it; `None` for any other."""
    return next((family for family in FAMILIES if family.pipeline == pipeline), None)


def load_pipeline(pretrained_model_name_or_path=None, **kwargs) -> DiffusionPipeline:
    """Load a checkpoint of any family; arguments as for [`AutoregressiveImagePipeline.from_pretrained`].

    Raises:
        OSError: If there is no such checkpoint, if it is of another pipeline, or if its weights are damaged.
    """
    path = pretrained_model_name_or_path
    folder = CheckpointLoaderMixin.find_checkpoint(path, **kwargs)
    name = json.loads((folder / CheckpointLoaderMixin.config_name).read_text(encoding="utf-8")).get("_class_name")
    family = find_family(name)
    if family is None:
        known = ", ".join(family.pipeline for family in FAMILIES)
        raise OSError(f"{str(path)!r} holds another pipeline, of class {name!r}; expected {known}.")
    return family.pipeline_class.from_pretrained(path, **kwargs)
