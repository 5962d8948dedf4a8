"""`NoisyClassifier`: which class an image under noise belongs to, for classifier guidance."""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import nn

from ..conditioning.classes import resolve_class_label
from .schedules import training_scheduler
from .unet import check_sizes, to_patches


# Share of the image in the variance, at each place of the noise schedule.
ALPHAS_CUMPROD = training_scheduler().alphas_cumprod


class NoisyClassifier(ModelMixin, ConfigMixin):
    r"""The encoder half of a U-Net and a linear head, as the classifiers of ADM (arXiv 2105.05233, section 4).

    Its logits are a learnt prior plus evidence, which is multiplied by the share of the image in what it reads. So
    they are the prior where there is nothing but noise, and their gradient vanishes with the image, as that of a
    perfect classifier does. The first steps of sampling divide by that share, and would draw any error.

    Args:
        labels (`list[str]`): Names of the classes, by id.
        image_size (`int`, *optional*, defaults to 64): Side of the images, in pixels.
        block_out_channels (`list[int]`, *optional*, defaults to `(64, 128, 256)`):
            Channels of each level; from one to the next, height and width are halved.
        layers_per_block (`list[int]`, *optional*, defaults to `(1, 2, 2)`):
            Residual blocks of each level. The first level may have 0.
        attention_levels (`list[int]`, *optional*, defaults to `(2,)`): Levels with attention, from 0.
        attention_head_dim (`int`, *optional*, defaults to 32): Channels of an attention head.
        patch_size (`int`, *optional*, defaults to 1): 1, 2 or 4: a patch of that side is one position.
        dropout (`float`, *optional*, defaults to 0.0): Dropout in residual blocks and before the head.

    Raises:
        ValueError: If there are no two classes, or the sizes do not fit each other.

    Example:

    ```python
    >>> from llamagen_hf.diffusion.noisy_classifier import NoisyClassifier

    >>> classifier = NoisyClassifier.from_pretrained("runs/emoji/classifier")
    >>> probabilities = classifier(noisy, timesteps).softmax(-1)
    ```
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        labels: list[str],
        image_size: int = 64,
        block_out_channels: list[int] = (64, 128, 256),
        layers_per_block: list[int] = (1, 2, 2),
        attention_levels: list[int] = (2,),
        attention_head_dim: int = 32,
        patch_size: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_sizes(image_size, block_out_channels, layers_per_block, attention_levels, attention_head_dim, patch_size)
        if len(labels) < 2:
            raise ValueError(f"A classifier needs at least 2 classes; `labels` has {len(labels)}.")
        first, last = block_out_channels[0], block_out_channels[-1]
        groups, time_dim = math.gcd(32, *block_out_channels), 4 * first
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, time_dim)
        self.conv_in = nn.Conv2d(3 * patch_size**2, first, 3, padding=1)
        options = {"resnet_act_fn": "silu", "resnet_groups": groups, "dropout": dropout}
        options |= {"attention_head_dim": attention_head_dim, "resnet_time_scale_shift": "scale_shift"}
        self.down_blocks = nn.ModuleList()
        channels = first
        for level, width in enumerate(block_out_channels):
            block = get_down_block(
                "AttnDownBlock2D" if level in attention_levels else "ResnetDownsampleBlock2D",
                num_layers=layers_per_block[level],
                in_channels=channels,
                out_channels=width,
                temb_channels=time_dim,
                add_downsample=level < len(block_out_channels) - 1,
                resnet_eps=1e-5,
                downsample_padding=1,
                **options,
            )
            self.down_blocks.append(block)
            channels = width
        self.mid_block = UNetMidBlock2D(last, time_dim, attn_groups=groups, **options)
        self.norm_out = nn.GroupNorm(groups, last)
        self.head_dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, len(labels))
        self.prior = nn.Parameter(torch.zeros(len(labels)))

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor | int) -> torch.Tensor:
        """Classify noisy images.

        Args:
            noisy (`torch.Tensor` of shape `(batch, 3, image_size, image_size)`):
                Images of [`~llamagen_hf.diffusion.schedules.training_scheduler`]'s forward process.
            timesteps (`torch.Tensor` of shape `(batch,)` or `()`, or `int`): Their place in it, from 0 to 999.

        Returns:
            `torch.Tensor` of shape `(batch, classes)`: Logits, float32.

        Raises:
            ValueError: If the images are of another size.
        """
        size = self.config.image_size
        if noisy.shape[1:] != (3, size, size):
            raise ValueError(
                f"The classifier was trained on images of {size}x{size} pixels, not on "
                f"{noisy.shape[-1]}x{noisy.shape[-2]}."
            )
        timesteps = torch.as_tensor(timesteps, device=self.device).expand(len(noisy))
        hidden = self.conv_in(to_patches(noisy.to(self.device, self.dtype), self.config.patch_size))
        time = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        for block in self.down_blocks:
            hidden, _ = block(hidden, time)
        hidden = self.mid_block(hidden, time)
        pooled = nn.functional.silu(self.norm_out(hidden)).mean((2, 3))
        evidence = self.head(self.head_dropout(pooled)).float()
        signal = ALPHAS_CUMPROD.to(self.device)[timesteps.long()].sqrt()
        return self.prior.float() + signal[:, None] * evidence

    def class_ids(self, labels: int | str | list[int | str]) -> list[int]:
        """The ids of classes that are given by id or by name.

        Raises:
            FieldError: If there is no such class.
        """
        names = dict(enumerate(self.config.labels))
        labels = labels if isinstance(labels, list | tuple) else [labels]
        return [resolve_class_label(label, len(names), names) for label in labels]
