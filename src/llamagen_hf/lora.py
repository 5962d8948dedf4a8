"""LoRA adapters of the generator (arXiv 2106.09685), through PEFT."""

from pathlib import Path

from diffusers.utils import recurse_remove_peft_layers


# Every linear layer of the Llama. The conditions' embeddings and the output head stay as they are.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config(rank: int, alpha: int | None = None):
    """The `peft.LoraConfig` of a generator's adapter; `alpha` is `rank` by default, so that the scale is 1."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=TARGET_MODULES)


class LoraLoaderMixin:
    """Loads adapters into a pipeline's `transformer`, under the names that diffusers' pipelines use."""

    # Folders or Hub ids of the adapters that the pipeline draws with, so that a picture can say so.
    lora_paths: list[str] = []

    def load_lora_weights(self, path: str, adapter_name: str = "default", **kwargs) -> None:
        """Add an adapter that PEFT or generator training with `lora_rank` saved, and draw with it.

        Args:
            path (`str`): Folder or Hub id with `adapter_config.json`.
            adapter_name (`str`, *optional*, defaults to `"default"`): Its name in this pipeline.
            kwargs: As for [`~transformers.PreTrainedModel.load_adapter`], such as `revision` and `token`.

        Raises:
            ValueError: If there is no adapter, or if it is made for other sizes.
        """
        if Path(path).is_dir() and not (Path(path) / "adapter_config.json").is_file():
            raise ValueError(f"{str(path)!r} is no adapter: it has no adapter_config.json.")
        try:
            self.transformer.load_adapter(str(path), adapter_name=adapter_name, **kwargs)
        except RuntimeError as error:
            raise ValueError(f"The adapter {str(path)!r} does not fit this generator: {error}") from error
        self.lora_paths = [*self.lora_paths, str(path)]

    def fuse_lora(self) -> None:
        """Add the active adapters to the weights for good, so that the pipeline saves and compiles like any other."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.transformer.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        paths = self.lora_paths
        self.unload_lora_weights()
        self.lora_paths = paths

    def unload_lora_weights(self) -> None:
        """Remove all adapters."""
        if not has_adapter(self.transformer):
            raise ValueError("There is no adapter; load one with load_lora_weights.")
        recurse_remove_peft_layers(self.transformer)
        del self.transformer.peft_config
        self.transformer._hf_peft_config_loaded = False
        self.lora_paths = []
        # Loading has left the adapter's renamings here, by which saving would rename all weights.
        self.transformer.__dict__.pop("_weight_conversions", None)

    def save_pretrained(self, save_directory, **kwargs):
        """Save the pipeline, see [`~diffusers.DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: If an adapter is loaded: transformers would then save it in place of the generator's weights.
        """
        if has_adapter(self.transformer):
            raise ValueError(
                "The pipeline has a LoRA adapter: call fuse_lora() to save it within the weights, or "
                "unload_lora_weights() to save without it."
            )
        return super().save_pretrained(save_directory, **kwargs)


def has_adapter(transformer) -> bool:
    """Whether an adapter is loaded into a model of transformers."""
    return getattr(transformer, "_hf_peft_config_loaded", False)
