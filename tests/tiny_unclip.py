"""Tiny real components of DALL-E 2: a CLIP model's halves, and priors of both kinds."""

from pathlib import Path

import torch
from diffusers import PriorTransformer
from tiny import build_clip, build_transformer, build_vq_model
from tiny_diffusion import build_unet, scaled
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from llamagen_hf import (
    AutoregressiveImagePipeline,
    EmbeddingPriorPipeline,
    EmbeddingQuantizer,
    PixelDiffusionPipeline,
    PriorDecoderPipeline,
)
from llamagen_hf.diffusion.schedules import sampling_scheduler
from llamagen_hf.unclip.clip_encoders import CLIPEncoders, split_clip
from llamagen_hf.unclip.embedding_denoising import prior_scheduler


DIM, LENGTH = 8, 12  # of the embeddings of `tiny.build_clip`, and of its captions


def build_clip_encoders() -> CLIPEncoders:
    return split_clip(*build_clip())


def build_prior(**kwargs) -> PriorTransformer:
    """Weights larger than at the start of training, so that captions change what is drawn."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": DIM}
    prior = PriorTransformer(**sizes | {"num_embeddings": LENGTH} | kwargs).eval()
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            if name.startswith(("embedding_proj", "encoder_hidden", "positional", "prd", "proj_in")):
                parameter.normal_(std=1.0)
            elif ".attn1.to_" in name:
                parameter.mul_(4.0)
        prior.clip_mean.normal_(std=0.1)
        prior.clip_std.uniform_(0.2, 0.4)
    return prior


def build_quantizer(num_dims: int = 4, num_buckets: int = 16) -> EmbeddingQuantizer:
    embeds = torch.nn.functional.normalize(torch.randn(400, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    return EmbeddingQuantizer(DIM, num_dims, num_buckets).fit(embeds)


def build_prior_pipeline(kind: str = "diffusion", image_encoder: bool = True) -> EmbeddingPriorPipeline:
    """A prior of the kind "diffusion" or "autoregressive"."""
    encoders = build_clip_encoders().components
    if not image_encoder:
        encoders |= {"image_encoder": None, "image_processor": None}
    if kind == "diffusion":
        parts = {"prior": build_prior(), "scheduler": prior_scheduler()}
    else:
        sizes = {"vocab_size": 16, "grid_size": 2, "condition_length": LENGTH, "condition_dim": DIM}
        parts = {"prior": build_transformer(conditioning="text", **sizes), "quantizer": build_quantizer()}
    defaults = {"num_inference_steps": 5} if kind == "diffusion" else None
    pipe = EmbeddingPriorPipeline(**parts, **encoders, sampling_defaults=defaults)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_decoder(kind: str = "diffusion") -> PixelDiffusionPipeline | AutoregressiveImagePipeline:
    """Of 16 x 16 pixels, or autoregressive of 8 x 8; both draw from an embedding."""
    if kind == "diffusion":
        unet = scaled(build_unet(condition_dim=DIM), 20.0)
        defaults = {"num_inference_steps": 3}
        return PixelDiffusionPipeline(unet, sampling_scheduler(), condition_length=1, sampling_defaults=defaults)
    transformer = build_transformer(conditioning="text", condition_length=1, condition_dim=DIM)
    return AutoregressiveImagePipeline(build_vq_model(), transformer, sampling_defaults={"guidance_scale": 2.0})


def build_unclip(decoder: str = "diffusion", prior: str = "diffusion", **kwargs) -> PriorDecoderPipeline:
    pipe = PriorDecoderPipeline(build_prior_pipeline(prior, **kwargs), build_decoder(decoder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kandinsky_encoders() -> tuple[CLIPTextModelWithProjection, CLIPVisionModelWithProjection]:
    """A CLIP whose text states are as wide as its embeddings, as Kandinsky's prior takes them."""
    torch.manual_seed(0)
    encoders = split_clip(*build_clip(projection_dim=16))
    return encoders.text_encoder, encoders.image_encoder


def save_clip(folder: Path) -> Path:
    """A CLIP model with its processor, as transformers saves both."""
    model, processor = build_clip()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def prior_config(folder: Path, **kwargs):
    """A prior for the datasets of `tiny_training`, with `clip` or `init_from`."""
    from llamagen_hf.unclip.training.prior_config import PriorTrainingConfig  # needs the training extra

    settings = {
        "caption_templates": {"{caption}": 1.0, "{tags}": 1.0},
        "truncate_captions": True,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "grid_size": 2,
        "num_buckets": 8,
        "max_train_steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "checkpointing_steps": 4,
        "log_steps": 2,
        "eval_steps": 4,
        "sample_steps": 4,
    }
    return PriorTrainingConfig(output_dir=str(folder), **settings | kwargs)
