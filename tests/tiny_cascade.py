"""Tiny cascades: bases of 8 x 8 pixels of several kinds, and an upsampler to 16 x 16."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from tiny import build_class_pipeline, build_text_pipeline
from tiny_diffusion import build_diffusion_pipeline, build_if_pipeline

from llamagen_hf import CascadePipeline


def build_ddpm_pipeline(image_size: int = 8) -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=image_size,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return DDPMPipeline(unet.eval(), DDPMScheduler())


def build_dit_pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        out_channels=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    return DiTPipeline(
        transformer.eval(), vae.eval(), DDIMScheduler(), id2label={1: "goldfish, Carassius", 4: "crane"}
    )


BASES = {
    "text": (build_text_pipeline, {"prompt": "a red apple"}),
    "class": (build_class_pipeline, {"class_labels": "goldfish"}),
    "diffusion": (lambda: build_diffusion_pipeline(image_size=8), {"prompt": "a red apple"}),
    "deepfloyd": (build_if_pipeline, {"prompt": "a red apple", "negative_prompt": "blue", "num_inference_steps": 3}),
    "ddpm": (build_ddpm_pipeline, {"num_inference_steps": 3}),
    "dit": (build_dit_pipeline, {"class_labels": 4, "num_inference_steps": 3}),
}


def build_cascade(base: str = "text", text: bool = True) -> CascadePipeline:
    """From 8 x 8 to 16 x 16 pixels. `text=False` for an upsampler that reads no text."""
    return quiet(CascadePipeline(BASES[base][0](), build_diffusion_pipeline(text, upsamples=True)))


def build_nested_cascade() -> CascadePipeline:
    """From 8 to 16 to 32 pixels."""
    return quiet(CascadePipeline(build_cascade(), build_diffusion_pipeline(text=False, upsamples=True, image_size=32)))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
