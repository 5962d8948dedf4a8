"""LlamaGen on stock vLLM, with classifier-free guidance of its own strength for each request: extra `vllm`."""

from .engine import EngineDiedError, VLLMEngine
from .engine_args import engine_arguments
from .requests import GenerationSettings, class_prompt, sampling_params, text_prompt


__all__ = [
    "GenerationSettings",
    "EngineDiedError",
    "VLLMEngine",
    "class_prompt",
    "engine_arguments",
    "sampling_params",
    "text_prompt",
]
