"""LoRA adapters of the generator (arXiv 2106.09685), through PEFT."""

from itertools import groupby
from pathlib import Path

from diffusers.utils import recurse_remove_peft_layers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError


# Every linear layer of the Llama. The conditions' embeddings and the output head stay as they are.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Arguments that say how to fetch an adapter.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def lora_config(rank: int, alpha: int | None = None):
    """The `peft.LoraConfig` of a generator's adapter; `alpha` is `rank` by default, so that the scale is 1."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=TARGET_MODULES)


class LoraLoaderMixin:
    """Loads adapters into a pipeline's `transformer`, under the names that diffusers' pipelines use."""

    # The adapters that the pipeline draws with, so that a picture can say so: `path`, and where they apply `revision`
    # (a commit of the Hub), `name` and `fused`.
    loras: list[dict] = []

    def load_lora_weights(self, path: str, adapter_name: str = "default", **kwargs) -> None:
        """Add an adapter that PEFT or generator training with `lora_rank` saved, and draw with it.

        Args:
            path (`str`): Folder or Hub id with `adapter_config.json`.
            adapter_name (`str`, *optional*, defaults to `"default"`): Its name in this pipeline.
            kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` for the Hub; others are
                those of [`~transformers.PreTrainedModel.load_adapter`].

        Raises:
            ValueError: If there is no adapter, or if it is made for other sizes.
        """
        path, lora = str(path), {"path": str(path)}
        if adapter_name != "default":
            lora["name"] = adapter_name
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        folder = Path(path)
        if not folder.is_dir():
            folder = download_adapter(path, **options)
            lora["revision"] = folder.name  # so that weights that are changed later are not taken for these
        if not (folder / "adapter_config.json").is_file():
            raise ValueError(f"{path!r} is no adapter: it has no adapter_config.json.")
        try:
            self.transformer.load_adapter(str(folder), adapter_name=adapter_name, **kwargs)
        except RuntimeError as error:
            raise ValueError(f"The adapter {path!r} does not fit this generator: {error}") from error
        self.loras = [*self.loras, lora]

    def load_loras(self, loras: list[dict]) -> None:
        """Load adapters as the parameters of a picture name them, and fuse those that were fused.

        Args:
            loras (`list[dict]`): The `lora` of an output's `parameters`.

        Raises:
            ValueError: If it is something else, or as for [`load_lora_weights`].
        """
        if not all(isinstance(lora, dict) and isinstance(lora.get("path"), str) for lora in loras):
            raise ValueError(f"These parameters are damaged: lora is {loras!r}.")
        for is_fused, group in groupby(loras, key=lambda lora: lora.get("fused", False)):
            for lora in group:
                revision = {"revision": lora["revision"]} if "revision" in lora else {}
                self.load_lora_weights(lora["path"], lora.get("name", "default"), **revision)
            if is_fused:
                self.fuse_lora()

    def fuse_lora(self) -> None:
        """Add the active adapters to the weights for good, so that the pipeline saves and compiles like any other."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in self.transformer.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()
        fused = [lora | {"fused": True} for lora in self.loras]  # rounded otherwise than beside the weights
        self.unload_lora_weights()
        self.loras = fused

    def unload_lora_weights(self) -> None:
        """Remove all adapters."""
        if not has_adapter(self.transformer):
            raise ValueError("There is no adapter; load one with load_lora_weights.")
        recurse_remove_peft_layers(self.transformer)
        del self.transformer.peft_config
        self.transformer._hf_peft_config_loaded = False
        self.loras = [lora for lora in self.loras if lora.get("fused")]
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


def download_adapter(repo_id: str, **options) -> Path:
    """Fetch an adapter from the Hub into the cache: a folder named by the commit; a `ValueError` if there is none."""
    try:
        return Path(snapshot_download(repo_id, allow_patterns="adapter_*", **options))
    except (OSError, HFValidationError) as error:
        raise ValueError(f"There is no adapter {repo_id!r}, as a folder or on the Hub.") from error


def has_adapter(transformer) -> bool:
    """Whether an adapter is loaded into a model of transformers."""
    return getattr(transformer, "_hf_peft_config_loaded", False)
