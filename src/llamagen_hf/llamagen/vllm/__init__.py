"""LlamaGen on stock vLLM, with classifier-free guidance of its own strength for each request: extra `vllm`."""

from .engine import EngineDiedError, VLLMEngine
from .settings import GenerationSettings, class_prompt, sampling_params, text_prompt
from .start import engine_arguments


__all__ = [
    "GenerationSettings",
    "EngineDiedError",
    "VLLMEngine",
    "class_prompt",
    "engine_arguments",
    "sampling_params",
    "text_prompt",
]
