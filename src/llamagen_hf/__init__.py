"""Autoregressive image generation (LlamaGen, arXiv 2406.06525) for diffusers and transformers."""

# diffusers loads a component through the library that model_index.json names, and looks for these base classes there.
from diffusers import ModelMixin
from transformers import PreTrainedModel

from .configuration import LlamaGenConfig
from .modeling import LlamaGenForConditionalGeneration, LlamaGenModel
from .pipeline import AutoregressiveImagePipeline
from .vq_model import LlamaGenVQModel


__version__ = "0.1.0"

__all__ = [
    "AutoregressiveImagePipeline",
    "LlamaGenConfig",
    "LlamaGenForConditionalGeneration",
    "LlamaGenModel",
    "LlamaGenVQModel",
    "ModelMixin",
    "PreTrainedModel",
]
