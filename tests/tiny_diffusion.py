"""Tiny real components of pixel diffusion."""

import torch
from diffusers import UNet2DConditionModel

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
