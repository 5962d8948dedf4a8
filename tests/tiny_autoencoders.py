"""Tiny autoencoders of every kind that can be compared."""

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage, AutoencoderRAE, AutoencoderTiny, VQModel
from tiny import build_vq_model
from torch import nn
from transformers import JanusConfig, JanusForConditionalGeneration, JanusVQVAE, JanusVQVAEConfig


def build_kl() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=3,
    )  # fmt: skip


def build_diffusers_vq_model() -> VQModel:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=3, num_vq_embeddings=32,
    )  # fmt: skip


def build_tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=2,
    )  # fmt: skip


def build_dc() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(4, 8), decoder_block_out_channels=(4, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        attention_head_dim=4,
    )  # fmt: skip


def build_rae() -> AutoencoderRAE:
    return AutoencoderRAE(
        encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=8, encoder_num_hidden_layers=1,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, patch_size=4, encoder_input_size=64,
    )  # fmt: skip


def build_qwen_image() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=3, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 3,
        latents_std=[1.0] * 3,
    )  # fmt: skip


JANUS = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 16}
JANUS |= {"latent_channels": 32, "embed_dim": 4, "num_embeddings": 32}


def build_janus() -> JanusVQVAE:
    return JanusVQVAE(JanusVQVAEConfig(**JANUS))


def build_janus_model() -> JanusForConditionalGeneration:
    """All of Janus: its tokenizer beside a language model and an encoder of images with as many patches as codes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return JanusForConditionalGeneration(
        JanusConfig(
            text_config=sizes | {"model_type": "llama", "vocab_size": 64},
            vision_config=sizes
            | {"image_size": 32, "patch_size": 2, "projection_dim": 16},  # as many patches as codes
            vq_config=JANUS | {"projection_dim": 16, "image_token_embed_dim": 16},
        )
    ).eval()


# By name: how it is built, then factor, channels and codes.
KINDS = {
    "llamagen": (build_vq_model, 2, 4, 64),
    "kl": (build_kl, 2, 3, None),
    "vq": (build_diffusers_vq_model, 2, 3, 32),
    "tiny": (build_tiny, 2, 2, None),
    "dc": (build_dc, 2, 4, None),
    "rae": (build_rae, 4, 64, None),
    "qwen-image": (build_qwen_image, 2, 3, None),
    "janus": (build_janus, 2, 4, 32),
}


def build_autoencoder(kind: str) -> nn.Module:
    """All take images of 32 x 32 pixels."""
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()
