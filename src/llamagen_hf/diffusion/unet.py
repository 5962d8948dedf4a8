"""Imagen's Efficient U-Net (arXiv 2205.11487) as a configuration of diffusers' U-Net, and how it is called."""

import math

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.nn.parallel import DistributedDataParallel

from .schedules import level_timesteps


# Side of a patch and whether there is a small image beside the noisy one, by the channels that a U-Net reads.
INPUTS = {3 * count * side**2: (side, count == 2) for side in (1, 2, 4) for count in (1, 2)}


def efficient_unet(
    image_size: int,
    *,
    upsamples: bool = False,
    condition_dim: int | None = None,
    block_out_channels: tuple[int, ...] = (64, 128, 256),
    layers_per_block: tuple[int, ...] = (1, 2, 2),
    attention_levels: tuple[int, ...] = (2,),
    attention_head_dim: int = 32,
    patch_size: int = 1,
) -> UNet2DConditionModel:
    """An Efficient U-Net with random weights: most of its residual blocks work at low resolution.

    Residual sums are divided by the square root of 2, the time scales and shifts after each norm, and text enters
    by attention, with a mask, and pooled, added to the time.

    Args:
        image_size (`int`): Side of the images, in pixels.
        upsamples (`bool`, *optional*, defaults to `False`):
            Whether it also reads a smaller image, enlarged to `image_size`, and how much noise was added to that.
        condition_dim (`int`, *optional*): Width of the text states, or of an embedding; by default it reads no text.
        block_out_channels (`tuple[int, ...]`, *optional*, defaults to `(64, 128, 256)`):
            Channels of each level; from one to the next, height and width are halved.
        layers_per_block (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 2)`):
            Residual blocks of each level on the way down, one more on the way up. The first level may have 0.
        attention_levels (`tuple[int, ...]`, *optional*, defaults to `(2,)`): Levels with attention, from 0.
        attention_head_dim (`int`, *optional*, defaults to 32): Channels of an attention head.
        patch_size (`int`, *optional*, defaults to 1):
            1, 2 or 4: a patch of that side is one position of the U-Net, which makes it as many times faster.

    Raises:
        ValueError: If the sizes do not fit each other.
    """
    levels = len(block_out_channels)
    check_sizes(image_size, block_out_channels, layers_per_block, attention_levels, attention_head_dim, patch_size)
    attention, text = "Attn", {}
    if condition_dim is not None:
        attention = "SimpleCrossAttn"
        text = {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "encoder_hid_dim": condition_dim,
            "encoder_hid_dim_type": "text_proj",
            "cross_attention_dim": block_out_channels[-1],
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": condition_dim // math.gcd(condition_dim, attention_head_dim),
        }
    has_attention = [level in attention_levels for level in range(levels)]
    down = [f"{attention}DownBlock2D" if here else "ResnetDownsampleBlock2D" for here in has_attention]
    up = [f"{attention}UpBlock2D" if here else "ResnetUpsampleBlock2D" for here in reversed(has_attention)]
    channels = 3 * patch_size**2
    return UNet2DConditionModel(
        sample_size=image_size // patch_size,
        in_channels=2 * channels if upsamples else channels,
        out_channels=channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(block_out_channels),
        layers_per_block=tuple(layers_per_block),
        attention_head_dim=attention_head_dim,
        norm_num_groups=math.gcd(32, *block_out_channels),
        resnet_time_scale_shift="scale_shift",
        resnet_out_scale_factor=math.sqrt(2),
        mid_block_scale_factor=math.sqrt(2),
        class_embed_type="timestep" if upsamples else None,
        **{"mid_block_type": "UNetMidBlock2D"} | text,
    )


def check_sizes(image_size, block_out_channels, layers_per_block, attention_levels, attention_head_dim, patch_size):
    """Check that the sizes of [`efficient_unet`] fit each other, or raise a `ValueError`."""
    levels = len(block_out_channels)
    if patch_size not in (1, 2, 4):
        raise ValueError(f"`patch_size` is {patch_size}; expected 1, 2 or 4.")
    if len(layers_per_block) != levels:
        raise ValueError(
            f"`layers_per_block` has {len(layers_per_block)} numbers, but `block_out_channels` has {levels}; "
            "expected one of each for a level."
        )
    if layers_per_block[0] < 0 or min(layers_per_block[1:], default=1) < 1:
        raise ValueError(f"`layers_per_block` is {layers_per_block}; only the first level may have 0 of them.")
    if not set(attention_levels) <= set(range(levels)):
        raise ValueError(f"`attention_levels` is {attention_levels}; expected numbers from 0 to {levels - 1}.")
    attended = [block_out_channels[level] for level in attention_levels] + [block_out_channels[-1]]
    if wrong := [channels for channels in attended if channels % attention_head_dim]:
        raise ValueError(
            f"`attention_head_dim` is {attention_head_dim}, which does not divide the {wrong[0]} channels of a level "
            "with attention."
        )
    factor = patch_size * 2 ** (levels - 1)
    if image_size < 1 or image_size % factor:
        raise ValueError(
            f"`image_size` is {image_size}; with these levels and patches, expected a multiple of {factor}."
        )


def unwrapped(unet) -> UNet2DConditionModel:
    """The U-Net itself, if it is wrapped for training on several devices."""
    return unet.module if isinstance(unet, DistributedDataParallel) else unet


def patch_size(unet: UNet2DConditionModel) -> int:
    """Side of the patches that are one position of the U-Net: 1, 2 or 4."""
    return _inputs(unet)[0]


def upsamples(unet: UNet2DConditionModel) -> bool:
    """Whether the U-Net reads a small image beside the noisy one."""
    return _inputs(unet)[1]


def _inputs(unet: UNet2DConditionModel) -> tuple[int, bool]:
    channels = unwrapped(unet).config.in_channels
    if channels not in INPUTS:
        raise ValueError(
            f"The U-Net reads {channels} channels; a pixel diffusion U-Net reads one of {', '.join(map(str, INPUTS))}."
        )
    return INPUTS[channels]


def image_size(unet: UNet2DConditionModel) -> int:
    """Side of the images, in pixels."""
    return unwrapped(unet).config.sample_size * patch_size(unet)


def learns_variance(unet: UNet2DConditionModel) -> bool:
    """Whether the U-Net predicts the variance of a step too, as those of DeepFloyd IF do."""
    return unwrapped(unet).config.out_channels == 6 * patch_size(unet) ** 2


def condition_dim(unet: UNet2DConditionModel) -> int | None:
    """Width of the states that the U-Net reads; `None` if it reads no text."""
    config = unwrapped(unet).config
    types = [*config.down_block_types, config.mid_block_type or "", *config.up_block_types]
    if not any("CrossAttn" in name for name in types):
        return None
    return config.encoder_hid_dim or config.cross_attention_dim


def reads_text(unet: UNet2DConditionModel) -> bool:
    """Whether the U-Net reads text states."""
    return condition_dim(unet) is not None


def to_patches(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images `(batch, channels, height, width)` as `(batch, channels * side**2, height / side, width / side)`."""
    return images if side == 1 else F.pixel_unshuffle(images, side)


def from_patches(patches: torch.Tensor, side: int) -> torch.Tensor:
    """The way back from [`to_patches`]."""
    return patches if side == 1 else F.pixel_shuffle(patches, side)


def predict(
    unet: UNet2DConditionModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor | int,
    *,
    states: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    small: torch.Tensor | None = None,
    aug_level: torch.Tensor | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    """Call a U-Net on images. Training and sampling both do it here.

    Args:
        unet ([`~diffusers.UNet2DConditionModel`]): The U-Net, which may be wrapped.
        noisy (`torch.Tensor` of shape `(batch, 3, height, width)`): Noisy images.
        timesteps (`torch.Tensor` of shape `(batch,)` or `()`, or `int`): Their place in the schedule, from 0 to 999.
        states (`torch.Tensor` of shape `(batch, n, condition_dim)`, *optional*):
            Text states, if the U-Net reads text. What stands in padding must be zero.
        mask (`torch.Tensor` of shape `(batch, n)`, *optional*): 0 for padding; by default there is none.
        small (`torch.Tensor` of shape `(batch, 3, height, width)`, *optional*):
            If it upsamples, the smaller image, enlarged and noisy, see [`~llamagen_hf.diffusion.schedules.augment`].
        aug_level (`torch.Tensor` of shape `(batch,)`, *optional*): The level of the noise in it, in [0, 1].
        memory_format (`torch.memory_format`, *optional*, defaults to `torch.preserve_format`):
            What the U-Net computes in; `torch.channels_last` is up to twice as fast on a CPU.

    Returns:
        `torch.Tensor` of shape `(batch, 3, height, width)`: The prediction, in the dtype of the computation. With a
        learned variance there are 6 channels, the variance last.
    """
    own, side = unwrapped(unet), patch_size(unet)
    inputs = to_patches(noisy, side)
    if small is not None:
        inputs = torch.cat([inputs, to_patches(small, side)], dim=1)
    if states is not None:
        states = states.to(own.dtype)
        if mask is not None:
            states, mask = _unlike_positions(states, mask, inputs.shape[-2:], len(own.config.block_out_channels))
    output = unet(
        inputs.to(own.dtype, memory_format=memory_format),
        timesteps,
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
        class_labels=None if aug_level is None else level_timesteps(aug_level).to(inputs.device),
        return_dict=False,
    )[0]
    if learns_variance(unet):
        return torch.cat([from_patches(part, side) for part in output.chunk(2, dim=1)], dim=1)
    return from_patches(output, side)


def _unlike_positions(
    states: torch.Tensor, mask: torch.Tensor, size: tuple[int, int], levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and mask with one more masked position, if a level of the U-Net has as many positions as there are.

    The attention of such a level takes the mask of the text for one of text and image together, and fails.
    """
    height, width = size
    positions = set()
    for _ in range(levels):
        positions.add(height * width)
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if states.shape[1] in positions:
        return F.pad(states, (0, 0, 0, 1)), F.pad(mask, (0, 1))
    return states, mask
