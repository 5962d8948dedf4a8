"""How vLLM is started on a checkpoint of ours, and the refusal to start otherwise."""

from os import PathLike
from typing import TYPE_CHECKING, Any

from ..configuration import LlamaGenConfig
from ..pipeline import AutoregressiveImagePipeline
from .twin_config import LlamaGenTwinConfig, twin_config


if TYPE_CHECKING:
    from vllm.config import VllmConfig

PROCESSOR = "llamagen_hf.llamagen.vllm.processor:GuidedSampling"


def engine_arguments(
    pretrained_model_name_or_path: str | PathLike | None = None, revision: str | None = None, **kwargs
) -> dict[str, Any]:
    """Arguments with which vLLM's `LLM`, `EngineArgs` or `AsyncEngineArgs` draws with a checkpoint.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
            A pipeline's folder or Hub id, as for [`~AutoregressiveImagePipeline.from_pretrained`].
        revision (`str`, *optional*): A branch, tag or commit on the Hub.
        kwargs: More of vLLM's arguments: `tensor_parallel_size`, `max_num_seqs`, `gpu_memory_utilization` and so on.
            `dtype` is `"bfloat16"` by default, and `"float32"` on a CPU.

    Returns:
        `dict`: The arguments.

    Raises:
        OSError: If there is no such checkpoint.

    Example:

    ```python
    >>> from vllm import LLM
    >>> from llamagen_hf.llamagen.vllm import engine_arguments

    >>> llm = LLM(**engine_arguments("path/to/checkpoint", tensor_parallel_size=2))
    ```
    """
    from vllm.platforms import current_platform

    folder = AutoregressiveImagePipeline.find_checkpoint(pretrained_model_name_or_path, revision=revision)
    folder = folder / "transformer"
    is_text = LlamaGenConfig.from_pretrained(folder).conditioning == "text"
    return {
        "model": str(folder),
        "hf_overrides": twin_config,
        "logits_processors": [PROCESSOR],
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ours is transformers'
        "enable_prompt_embeds": is_text,
        # Two prompts that begin alike can have their words at other positions.
        "enable_prefix_caching": False,
        "dtype": "float32" if current_platform.is_cpu() else "bfloat16",
        **kwargs,
    }


def check_start(vllm_config: "VllmConfig") -> None:
    """Raise a `ValueError` unless vLLM was started with [`engine_arguments`]."""
    model_config = vllm_config.model_config
    missing = []
    if not isinstance(model_config.hf_config, LlamaGenTwinConfig):
        missing.append("hf_overrides")
    elif model_config.hf_config.generator_config.conditioning == "text" and not model_config.enable_prompt_embeds:
        missing.append("enable_prompt_embeds")
    processors = model_config.logits_processors or []
    if PROCESSOR not in (p if isinstance(p, str) else f"{p.__module__}:{p.__qualname__}" for p in processors):
        missing.append("logits_processors")
    if vllm_config.cache_config.enable_prefix_caching:
        missing.append("enable_prefix_caching=False")
    if missing:
        raise ValueError(
            f"vLLM lacks {', '.join(missing)}, without which images would come out wrong: start it with "
            "llamagen_hf.llamagen.vllm.engine_args."
        )
