"""Offloading of a pipeline's weights, where that of diffusers falls short."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _is_group_offload_enabled, _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import _func_optionally_disable_offloading
from torch import nn


def is_offloaded(model: nn.Module) -> bool:
    """Whether a model's weights are moved to the device only while its modules are called."""
    return _is_group_offload_enabled(model) or any(hasattr(module, "_hf_hook") for module in model.modules())


class OffloadingMixin:
    """Group offloading to disk of a [`~diffusers.DiffusionPipeline`] that reads back what it wrote."""

    def enable_group_offload(self, *args, offload_to_disk_path: str | None = None, **kwargs) -> None:
        """Offload groups of layers, see [`~diffusers.DiffusionPipeline.enable_group_offload`].

        On disk every component gets a folder of its own below `offload_to_disk_path`, which is removed with the
        component: groups are stored under the names of their layers, so that those of another component or of an
        earlier run would be read in their place.
        """
        if offload_to_disk_path is None:
            return super().enable_group_offload(*args, **kwargs)
        Path(offload_to_disk_path).mkdir(parents=True, exist_ok=True)
        excluded = kwargs.pop("exclude_modules", None) or []
        for name, model in self.components.items():
            if not isinstance(model, nn.Module):
                continue
            if name in ([excluded] if isinstance(excluded, str) else excluded):
                model.to(args[0] if args else kwargs["onload_device"])
                continue
            untie_weights(model)
            model._offload_folder = TemporaryDirectory(dir=offload_to_disk_path, prefix=f"{name}-")
            apply_group_offloading(model, *args, offload_to_disk_path=model._offload_folder.name, **kwargs)

    @contextmanager
    def offloading_paused(self) -> Iterator[None]:
        """Bring all weights back, so that layers can be added or changed, and offload them again afterwards.

        Raises:
            ValueError: If the weights are on disk, where they stay as they were.
        """
        models = [model for model in self.components.values() if isinstance(model, nn.Module)]
        if any(hasattr(model, "_offload_folder") for model in models):
            raise ValueError("The weights are offloaded to disk: change adapters before enable_group_offload.")
        is_model_offload, is_sequential_offload, is_group_offload = _func_optionally_disable_offloading(self)
        try:
            yield
        finally:
            if is_model_offload:
                self.enable_model_cpu_offload(device=self._offload_device)
            elif is_sequential_offload:
                self.enable_sequential_cpu_offload(device=self._offload_device)
            elif is_group_offload:
                for model in models:
                    _maybe_remove_and_reapply_group_offloading(model)


def untie_weights(model: nn.Module) -> None:
    """Give each of several modules that share a parameter a copy of its own.

    A group that is written to disk empties its parameters, so that a second group would write empty ones.
    """
    seen = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))
