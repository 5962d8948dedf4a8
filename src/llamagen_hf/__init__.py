"""Autoregressive image generation (LlamaGen, arXiv 2406.06525) for diffusers and transformers."""

import sys

import diffusers

# diffusers loads a component through the library that model_index.json names, and looks for these base classes there.
from diffusers import ModelMixin
from transformers import PreTrainedModel

from .diffusion.pipeline import PixelDiffusionPipeline
from .imagen.cascade import CascadePipeline
from .llamagen.configuration import LlamaGenConfig
from .llamagen.modeling import LlamaGenForConditionalGeneration, LlamaGenModel
from .llamagen.pipeline import AutoregressiveImagePipeline
from .llamagen.vq_model import LlamaGenVQModel
from .unclip.decoder_pipeline import PriorDecoderPipeline
from .unclip.embedding_codes import EmbeddingQuantizer
from .unclip.prior import EmbeddingPriorPipeline


# `DiffusionPipeline.from_pretrained` looks for a pipeline's class here, and for its components' library there, or else
# for code in the repository, of which there is none. diffusers has no way to register them.
for pipeline in (
    AutoregressiveImagePipeline,
    CascadePipeline,
    EmbeddingPriorPipeline,
    PixelDiffusionPipeline,
    PriorDecoderPipeline,
):
    setattr(diffusers, pipeline.__name__, pipeline)
diffusers.pipelines.llamagen_hf = sys.modules[__name__]

__version__ = "0.1.0"

__all__ = [
    "AutoregressiveImagePipeline",
    "CascadePipeline",
    "EmbeddingPriorPipeline",
    "EmbeddingQuantizer",
    "LlamaGenConfig",
    "LlamaGenForConditionalGeneration",
    "LlamaGenModel",
    "LlamaGenVQModel",
    "ModelMixin",
    "PixelDiffusionPipeline",
    "PreTrainedModel",
    "PriorDecoderPipeline",
]
