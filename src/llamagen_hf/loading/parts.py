"""A pipeline made of pipelines: loading, devices, precision and offloading reach what is within them."""

import json
from inspect import signature
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..local_paths import unless_folder
from .checkpoint import CheckpointLoaderMixin, find_missing_weights, origin_name, read_weight_names
from .lora import HUB_OPTIONS


# Arguments of `from_pretrained` that are passed on to each part.
PART_OPTIONS = ("variant", "use_safetensors", "low_cpu_mem_usage")


class PartsMixin(CheckpointLoaderMixin):
    """A [`~diffusers.DiffusionPipeline`] whose components are pipelines, each in a folder of its own."""

    @property
    def parts(self) -> dict[str, DiffusionPipeline]:
        """The pipelines by name, in the order of their work."""
        return {name: part for name, part in self.components.items() if isinstance(part, DiffusionPipeline)}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, **kwargs):
        """Load a checkpoint from a folder or from the Hub. No code of it is run.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder or a Hub id.
            dtype (`torch.dtype`, `str` or `dict`, *optional*, defaults to `torch.float32`):
                Of all weights, or a dict of it by part; `"auto"` for the fastest, as for the parts themselves.
            kwargs: A part, by its name, that is not to be loaded; `variant`, `use_safetensors` and `low_cpu_mem_usage`
                as for [`~diffusers.DiffusionPipeline.from_pretrained`]; what
                [`~llamagen_hf.loading.checkpoint.CheckpointLoaderMixin.download`] takes.

        Raises:
            OSError: If there is no such checkpoint, if it is of another pipeline, or if its weights are damaged or
                incomplete.
            ValueError: If an argument is something else.
        """
        path = pretrained_model_name_or_path
        names = list(signature(cls.__init__).parameters)[1:]
        if unknown := sorted(kwargs.keys() - {"dtype", "torch_dtype", *PART_OPTIONS, *HUB_OPTIONS, *names}):
            raise ValueError(f"{cls.__name__} is loaded without `{unknown[0]}`; load its parts with it and join them.")
        folder = cls.find_checkpoint(path, **{name: kwargs[name] for name in kwargs if name not in names})
        found = cls.load_config(folder).get("_class_name")
        if found != cls.__name__:
            raise OSError(
                f"{origin_name(path)!r} holds another pipeline, of class {found!r}; expected {cls.__name__}."
            )
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype", torch.float32))
        options = {name: kwargs[name] for name in PART_OPTIONS if name in kwargs}
        parts = {}
        for name in names:
            part_dtype = dtype.get(name, torch.float32) if isinstance(dtype, dict) else dtype
            parts[name] = kwargs[name] if name in kwargs else load_part(folder / name, dtype=part_dtype, **options)
        pipe = cls(**parts)
        pipe.register_to_config(_name_or_path=unless_folder(path))
        pipe._origin = {"checkpoint": origin_name(path)}
        if folder.parent.name == "snapshots":
            pipe._origin["revision"] = folder.name
        if kwargs.get("variant") is not None:
            pipe._origin["variant"] = kwargs["variant"]
        return pipe

    def to(self, *args, **kwargs):
        """Move all parts to a device or a dtype, see [`~diffusers.DiffusionPipeline.to`]."""
        for part in self.parts.values():
            part.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        """Where the first part is."""
        return next(iter(self.parts.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first part."""
        return next(iter(self.parts.values())).dtype

    @property
    def _execution_device(self) -> torch.device:
        return next(iter(self.parts.values()))._execution_device

    def enable_model_cpu_offload(self, *args, **kwargs) -> None:
        """Offload whole models of all parts, see [`~diffusers.DiffusionPipeline.enable_model_cpu_offload`]."""
        for part in self.parts.values():
            part.enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args, **kwargs) -> None:
        """Offload layers of all parts, see [`~diffusers.DiffusionPipeline.enable_sequential_cpu_offload`]."""
        for part in self.parts.values():
            part.enable_sequential_cpu_offload(*args, **kwargs)

    def enable_group_offload(self, *args, **kwargs) -> None:
        """Offload groups of layers of all parts, see [`~diffusers.DiffusionPipeline.enable_group_offload`]."""
        for part in self.parts.values():
            part.enable_group_offload(*args, **kwargs)

    def maybe_free_model_hooks(self) -> None:
        """Offload all parts again, see [`~diffusers.DiffusionPipeline.maybe_free_model_hooks`]."""
        for part in self.parts.values():
            part.maybe_free_model_hooks()

    def remove_all_hooks(self) -> None:
        """Take the offloading off all parts, see [`~diffusers.DiffusionPipeline.remove_all_hooks`]."""
        for part in self.parts.values():
            part.remove_all_hooks()

    def set_progress_bar_config(self, **kwargs) -> None:
        """Configure the progress bars of all parts: arguments of `tqdm`."""
        for part in self.parts.values():
            part.set_progress_bar_config(**kwargs)


def load_part(folder: Path, **kwargs) -> DiffusionPipeline:
    """Load a pipeline that is a part of another: one of this package or of diffusers.

    Raises:
        OSError: If there is none, or if its weights are damaged or incomplete.
    """
    if not (folder / CheckpointLoaderMixin.config_name).is_file():
        raise OSError(f"The checkpoint is incomplete: {folder.name}/{CheckpointLoaderMixin.config_name} is missing.")
    name = json.loads((folder / CheckpointLoaderMixin.config_name).read_text(encoding="utf-8")).get("_class_name")
    # The package sets its own classes as attributes of diffusers.
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        raise OSError(
            f"The {folder.name} of this checkpoint is of class {name!r}, which neither diffusers nor llamagen has."
        )
    part = kind.from_pretrained(folder, **kwargs)
    if isinstance(part, CheckpointLoaderMixin):
        part._origin = {}  # the whole has one
        return part
    for component, saved in read_weight_names(folder).items():
        model = part.components.get(component)
        if model is not None and (missing := find_missing_weights(model, saved)):
            raise OSError(f"The weights of {folder.name}/{component} miss {', '.join(missing)}.")
    for each in (part, *part.components.values()):
        if isinstance(each, (DiffusionPipeline, ModelMixin)):
            each.register_to_config(_name_or_path=None)  # a path, which saving would publish
    return part
