"""LoRA adapters of a pipeline's model (arXiv 2106.09685), through PEFT."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import groupby
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import delete_adapter_layers, is_peft_available, recurse_remove_peft_layers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file


# Arguments of a download from the Hub.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


# Every linear layer of a Llama. The conditions' embeddings and the output head stay as they are.
LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The attention of a U-Net, and the convolutions of its residual blocks, since not all of its levels have attention.
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "conv1", "conv2"]


def lora_config(rank: int, alpha: int | None = None, layers: list[str] = LLAMA_LAYERS):
    """The `peft.LoraConfig` of an adapter of some layers; `alpha` is `rank` by default, so that the scale is 1."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=layers)


def save_adapter(model, folder: Path, base: str | None = None, state: dict | None = None) -> None:
    """Save the only adapter of a diffusers model as PEFT does, which [`LoraLoaderMixin.load_lora_weights`] reads.

    Args:
        model ([`~diffusers.ModelMixin`]): The model with its adapter.
        folder (`Path`): Where to; it is created.
        base (`str`, *optional*): Hub id of what the adapter is for.
        state (`dict`, *optional*): The weights of a model of which each process has a part.
    """
    from peft.utils import get_peft_model_state_dict

    ((name, config),) = model.peft_config.items()
    config.base_model_name_or_path = base
    weights = get_peft_model_state_dict(model, state, name)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    weights = {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


class LoraLoaderMixin(LoraBaseMixin):
    """Loads adapters into one model of a pipeline; all else is [`~diffusers.loaders.lora_base.LoraBaseMixin`]'s.

    The model is the component that `_lora_loadable_modules` names: `transformer`, unless a pipeline says otherwise. It
    runs with the adapters that PEFT has switched on. Since pipelines may share a model, the origins of its adapters
    are kept with it: `lora_origins` by name, and the entries of [`loras`] for the adapters in its weights, which are
    `merged_loras` by name while they can be taken out, then `fused_loras`.
    """

    _lora_loadable_modules = ["transformer"]
    is_compiled = False  # whether the model is compiled with its adapters; pipelines that can compile override it

    @property
    def _adapted(self):
        """The model that takes the adapters; `None` if it was left out."""
        return getattr(self, self._lora_loadable_modules[0])

    @property
    def loras(self) -> list[dict]:
        """The adapters that the pipeline generates with, for the parameters of its images.

        Each has `path` and, where they apply, `revision` (a commit of the Hub), `name`, `weight` and `fused`. A weight
        that differs between layers is given by layer.
        """
        layers = adapter_layers(self._adapted)
        first = next(iter(layers.values()), None)
        final = getattr(self._adapted, "fused_loras", [])
        if first is None or first.disable_adapters:  # which takes out what is fused and still loaded
            return final
        if first.merged:
            return final + self._merged_loras(first)
        return final + [describe_adapter(self._adapted, layers, name) for name in first.active_adapters]

    def _merged_loras(self, layer) -> list[dict]:
        """The entries of the adapters that a layer has in its weights and could take out again."""
        recorded = getattr(self._adapted, "merged_loras", {})
        return [recorded.get(name, {"name": name, "fused": True}) for name in layer.merged_adapters]

    def load_lora_weights(self, path: str, adapter_name: str | None = None, **options) -> None:
        """Add an adapter that PEFT or a training with `lora_rank` saved, and switch it on alone.

        Args:
            path (`str`): Folder or Hub id with `adapter_config.json`.
            adapter_name (`str`, *optional*):
                Its name in this pipeline; by default `"default"`, then `"default_1"` and so on. [`set_adapters`]
                switches several on.
            options: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` for the Hub.

        Raises:
            ValueError: If there is no adapter, if it is made for other sizes, or if the name is taken.
        """
        if not is_peft_available():
            raise ImportError("Adapters need PEFT: pip install 'llamagen-hf[lora]'.")
        from peft import PeftConfig, inject_adapter_in_model
        from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

        if unknown := options.keys() - set(HUB_OPTIONS):
            raise TypeError(f"load_lora_weights takes no {', '.join(sorted(unknown))}; it takes {HUB_OPTIONS}.")
        path, model = str(path), self._adapted
        if model is None:
            raise ValueError(f"This pipeline has no {self._lora_loadable_modules[0]}, which takes adapters.")
        taken = getattr(model, "peft_config", {})
        if adapter_name is None:
            adapter_name = "default" if "default" not in taken else f"default_{len(taken)}"
        if adapter_name in taken:
            raise ValueError(f"There is an adapter {adapter_name!r} already: pass another adapter_name, or delete it.")
        self._check_not_fused("before loading another")
        folder, origin = Path(path), {"path": path}
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(path, allow_patterns="adapter_*", **options))
            except (OSError, HFValidationError) as error:
                raise ValueError(f"There is no adapter {path!r}, as a folder or on the Hub.") from error
            origin["revision"] = folder.name  # the commit, since the repository may change later
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(f"{path!r} is not an adapter: it has no adapter_config.json.")
        with self._changing_adapters():
            active = self.get_active_adapters()
            try:
                config = PeftConfig.from_pretrained(str(folder))
                config.inference_mode = True
                weights = load_peft_weights(str(folder), device="cpu")
                inject_adapter_in_model(config, model, adapter_name)
                names = {name.removeprefix("base_model.model.") for name in weights}
                if names != (expected := set(get_peft_model_state_dict(model, adapter_name=adapter_name))):
                    raise ValueError(f"its layers differ, at {min(names ^ expected)}.")
                set_peft_model_state_dict(model, weights, adapter_name)
            except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
                remove_adapters(model, [adapter_name])
                if active:
                    self.set_adapters(active, None)
                raise ValueError(f"The adapter {path!r} does not fit this model: {error}") from error
            model._hf_peft_config_loaded = True  # transformers then knows about them
            model.train(model.training)  # new layers start in training mode
        model.lora_origins = getattr(model, "lora_origins", {}) | {adapter_name: origin}

    def load_loras(self, loras: list[dict]) -> None:
        """Load the adapters that the parameters of an image name, and fuse those that were fused.

        Args:
            loras (`list[dict]`): The `lora` of an output's `parameters`.

        Raises:
            ValueError: If `loras` is something else, or as for [`load_lora_weights`].
        """
        if not all(isinstance(lora, dict) and isinstance(lora.get("path"), str) for lora in loras):
            raise ValueError(f"These parameters are damaged: lora is {loras!r}.")
        for is_fused, group in groupby(loras, key=lambda lora: lora.get("fused", False)):
            weights = {}
            for lora in group:
                revision = {"revision": lora["revision"]} if "revision" in lora else {}
                name = lora.get("name", "default")
                self.load_lora_weights(lora["path"], name, **revision)
                weights[name] = {self._lora_loadable_modules[0]: lora.get("weight", 1.0)}
            self.set_adapters(list(weights), list(weights.values()))
            if is_fused:
                self.fuse_lora()
                self.unload_lora_weights()

    def fuse_lora(self, components: list[str] | None = None, **kwargs) -> None:
        """Add the active adapters to the weights, see [`~diffusers.loaders.lora_base.LoraBaseMixin.fuse_lora`].

        The pipeline then saves like one without adapters. [`unfuse_lora`] takes the adapters out again;
        [`unload_lora_weights`] leaves them in for good, after which the pipeline also compiles like any other.

        Raises:
            ValueError: If there is no adapter.
        """
        layers = adapter_layers(self._adapted)
        if not layers:
            raise ValueError("There is no adapter; load one with load_lora_weights.")
        first = next(iter(layers.values()))
        before = list(first.merged_adapters)
        if kwargs.get("lora_scale", 1.0) != 1:
            self._check_not_fused("before fusing with another lora_scale")
        with self._changing_adapters():
            super().fuse_lora(components or self._lora_loadable_modules, **kwargs)
        # Recorded as fused, since beside the weights they would round differently and could be weighted anew.
        new = [name for name in first.merged_adapters if name not in before]
        fused = [describe_adapter(self._adapted, layers, name) | {"fused": True} for name in new]
        recorded = getattr(self._adapted, "merged_loras", {})
        self._adapted.merged_loras = recorded | dict(zip(new, fused, strict=True))

    def unfuse_lora(self, components: list[str] | None = None, **kwargs) -> None:
        """Take the loaded adapters out of the weights again."""
        with self._changing_adapters():
            super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)

    def unload_lora_weights(self) -> None:
        """Remove all adapters; fused adapters stay in the weights."""
        for first in list(adapter_layers(self._adapted).values())[:1]:
            final = getattr(self._adapted, "fused_loras", [])
            self._adapted.fused_loras = final + self._merged_loras(first)
        with self._changing_adapters():
            remove_adapters(self._adapted, list(getattr(self._adapted, "peft_config", {})))

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove some adapters.

        Raises:
            ValueError: If one of them is not loaded, or if any are fused.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        loaded = list(getattr(self._adapted, "peft_config", {}))
        if missing := [name for name in names if name not in loaded]:
            raise ValueError(f"There is no adapter {missing[0]!r}; there are {loaded}.")
        self._check_not_fused("before deleting any")
        with self._changing_adapters():
            remove_adapters(self._adapted, names)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that are switched on; diffusers 0.41 finds them in its own models only."""
        first = next(iter(adapter_layers(self._adapted).values()), None)
        return [] if first is None else list(first.active_adapters)

    def set_adapters(self, *args, **kwargs) -> None:
        """Choose the adapters to switch on, see [`~diffusers.loaders.lora_base.LoraBaseMixin.set_adapters`]."""
        self._check_not_compiled()
        self._check_not_fused("before choosing others")  # unfusing would subtract the new adapters
        super().set_adapters(*args, **kwargs)

    def enable_lora(self) -> None:
        """Switch the adapters on again."""
        self._check_not_compiled()
        super().enable_lora()

    def disable_lora(self) -> None:
        """Switch the adapters off; they stay loaded."""
        self._check_not_compiled()
        super().disable_lora()

    def _check_not_fused(self, when: str) -> None:
        if any(layer.merged for layer in adapter_layers(self._adapted).values()):
            raise ValueError(f"Adapters are fused: call unfuse_lora() or unload_lora_weights() {when}.")

    def _check_not_compiled(self) -> None:
        if self.is_compiled:
            raise ValueError("The step is compiled with its present weights: change adapters before compile_step.")

    @contextmanager
    def _changing_adapters(self) -> Iterator[None]:
        self._check_not_compiled()
        with self.offloading_paused():
            yield

    # A pipeline that holds this one reads its signature to see what it may pass on.
    @wraps(DiffusionPipeline.save_pretrained, assigned=())
    def save_pretrained(self, save_directory, **kwargs):
        """Save the pipeline, see [`~diffusers.DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: If an adapter is loaded and not fused: transformers would then save it in place of the
                model's weights.
        """
        layers = adapter_layers(self._adapted)
        if not all(layer.merged for layer in layers.values()):
            raise ValueError(
                "The pipeline has a LoRA adapter: call fuse_lora() to save it within the weights, or "
                "unload_lora_weights() to save without it."
            )
        with adapters_lifted(self._adapted, layers):
            return super().save_pretrained(save_directory, **kwargs)


def adapter_layers(model) -> dict:
    """PEFT's layers in a model, by name; an empty dict without adapters."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def describe_adapter(model, layers: dict, adapter_name: str) -> dict:
    """What [`LoraLoaderMixin.loras`] says about an adapter."""
    weights = {}
    for name, layer in layers.items():
        if adapter_name in layer.scaling:
            # PEFT keeps the product of the weight and what the configuration says.
            rank, config = layer.r[adapter_name], model.peft_config[adapter_name]
            scale = layer.lora_alpha[adapter_name] / (rank**0.5 if config.use_rslora else rank)
            weights[name] = round(layer.scaling[adapter_name] / scale, 9)
    lora = dict(getattr(model, "lora_origins", {}).get(adapter_name, {}))
    if adapter_name != "default" or not lora:
        lora["name"] = adapter_name
    if len(set(weights.values())) > 1:
        lora["weight"] = weights
    elif (weight := next(iter(weights.values()))) != 1:
        lora["weight"] = weight
    return lora


def remove_adapters(model, names: list[str]) -> None:
    """Remove adapters, and with the last one PEFT's layers."""
    loaded = getattr(model, "peft_config", {})
    if loaded.keys() - set(names):
        for name in names:
            delete_adapter_layers(model, name)
        return
    recurse_remove_peft_layers(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
    # transformers' own loading of adapters leaves renamings here, which would rename all weights when they are saved.
    model.__dict__.pop("_weight_conversions", None)


@contextmanager
def adapters_lifted(model, layers: dict) -> Iterator[None]:
    """Take PEFT's layers off for the moment, so that the weights have their own names."""
    if not layers:
        yield
        return
    config = model.peft_config
    remove_adapters(model, list(config))
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        model.peft_config, model._hf_peft_config_loaded = config, True
