"""Tiny real components of pixel diffusion."""

import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from tiny import build_text_encoder
from transformers import ByT5Tokenizer

from llamagen_hf import PixelDiffusionPipeline
from llamagen_hf.diffusion.schedules import sampling_scheduler
from llamagen_hf.diffusion.unet import efficient_unet


def build_unet(**kwargs) -> UNet2DConditionModel:
    torch.manual_seed(0)
    sizes = {
        "image_size": 16,
        "block_out_channels": (8, 16),
        "layers_per_block": (1, 1),
        "attention_levels": (1,),
        "attention_head_dim": 8,
    }
    return efficient_unet(**sizes | kwargs).eval()


def build_diffusion_pipeline(text: bool = True, **kwargs) -> PixelDiffusionPipeline:
    """A base of 16 x 16 pixels; `upsamples=True` for an upsampler, `text=False` for one that reads no text."""
    dim = 16 if text else None
    pipe = PixelDiffusionPipeline(
        # With weights as at the start of training, prompts would hardly change an image.
        unet=scaled(build_unet(condition_dim=dim, **kwargs), 3.0),
        scheduler=sampling_scheduler(),
        text_encoder=build_text_encoder() if text else None,
        tokenizer=ByT5Tokenizer() if text else None,
        condition_length=12,
        sampling_defaults={"num_inference_steps": 4},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scaled(unet: UNet2DConditionModel, factor: float) -> UNet2DConditionModel:
    """The same U-Net with larger weights in what reads text and levels of noise."""
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.startswith(("encoder_hid_proj", "add_embedding", "class_embedding")) or ".add_" in name:
                parameter.mul_(factor)
    return unet


# A text encoder is as wide as that of `tiny.build_text_encoder`.
IF_SIZES = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "norm_num_groups": 4,
    "encoder_hid_dim": 16,
    "encoder_hid_dim_type": "text_proj",
    "cross_attention_dim": 16,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 2**0.5,
    "mid_block_scale_factor": 2**0.5,
    "time_embedding_act_fn": "gelu",
    "conv_in_kernel": 3,
    "only_cross_attention": False,
}


def build_if_pipeline(upsamples: bool = False, text: bool = True) -> IFPipeline | IFSuperResolutionPipeline:
    """DeepFloyd IF's first or second stage, with random weights and all that its folders hold."""
    torch.manual_seed(0)
    channels = {"in_channels": 6, "class_embed_type": "timestep"} if upsamples else {"in_channels": 3}
    kind = IFSuperResolutionPipeline if upsamples else IFPipeline
    schedule = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    limits = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    more = {"image_noising_scheduler": DDPMScheduler(**schedule)} if upsamples else {}
    pipe = kind(
        unet=UNet2DConditionModel(**IF_SIZES | channels, out_channels=6).eval(),
        scheduler=DDPMScheduler(**schedule | limits, variance_type="learned_range"),
        text_encoder=build_text_encoder() if text else None,
        tokenizer=ByT5Tokenizer() if text else None,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **more,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
