"""Tiny real components: the classes and code paths of large checkpoints at a size that draws in milliseconds."""

import torch
from transformers import (
    ByT5Tokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    T5Config,
    T5EncoderModel,
)

from llamagen_hf import (
    AutoregressiveImagePipeline,
    LlamaGenConfig,
    LlamaGenForConditionalGeneration,
    LlamaGenVQModel,
)


LABELS = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "crane", 4: "golden retriever"}
LABELS |= {i: f"thing {i}" for i in range(5, 10)}


def build_vq_model(**kwargs) -> LlamaGenVQModel:
    torch.manual_seed(0)
    sizes = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "latent_channels": 8,
        "num_vq_embeddings": 64,
        "vq_embed_dim": 4,
        "norm_num_groups": 4,
        "sample_size": 8,
    }
    return LlamaGenVQModel(**sizes | kwargs).eval()


def build_transformer(**kwargs) -> LlamaGenForConditionalGeneration:
    """Weights ten times larger than at the start of training, so that conditions and codes change the logits."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "grid_size": 4,
        "initializer_range": 0.2,
    }
    text = {"conditioning": "text", "condition_length": 12, "condition_dim": 16}
    sizes |= text if kwargs.get("conditioning") == "text" else {"num_classes": 10, "id2label": LABELS}
    return LlamaGenForConditionalGeneration(LlamaGenConfig(**sizes | kwargs)).eval()


def build_text_encoder() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False)
    return T5EncoderModel(config).eval()


def build_clip(projection_dim: int = 8) -> tuple[CLIPModel, CLIPProcessor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": 384, "max_position_embeddings": 12, "eos_token_id": 1},
        vision_config=sizes | {"image_size": 8, "patch_size": 4},
        projection_dim=projection_dim,
    )
    size = {"height": 8, "width": 8}
    return CLIPModel(config).eval(), CLIPProcessor(CLIPImageProcessorPil(size=size, crop_size=size), ByT5Tokenizer())


def build_class_pipeline() -> AutoregressiveImagePipeline:
    pipe = AutoregressiveImagePipeline(build_vq_model(), build_transformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_text_pipeline() -> AutoregressiveImagePipeline:
    pipe = AutoregressiveImagePipeline(
        build_vq_model(), build_transformer(conditioning="text"), build_text_encoder(), ByT5Tokenizer()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
