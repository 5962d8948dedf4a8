"""The losses of an image tokenizer's training, and the discriminators that it is trained against.

The discriminators are VQGAN's PatchGAN and a residual one after StyleGAN2. Their logits are high for images that look
real.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .vq_config import TokenizerTrainingConfig


def reconstruction_loss(sample: torch.Tensor, images: torch.Tensor, config: TokenizerTrainingConfig) -> torch.Tensor:
    """Weighted sum of the L1 and L2 errors of pixels and of the L1 error of neighbour differences, for sharp edges.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Reconstructions, nominally in [-1, 1].
        images (`torch.Tensor` of that shape): The images, in [-1, 1].
        config ([`TokenizerTrainingConfig`]): `l1_weight`, `l2_weight` and `gradient_weight`.

    Returns:
        `torch.Tensor`: A scalar.
    """
    error = sample.float() - images
    loss = config.l1_weight * error.abs().mean() + config.l2_weight * error.square().mean()
    if config.gradient_weight:
        gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + config.gradient_weight * gradients
    return loss


def discriminator_loss(kind: str, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss: the mean of its losses on real and on reconstructed images.

    `"hinge"` is `relu(1 - real)` and `relu(1 + fake)` (Lim and Ye, arXiv 1705.02894). `"vanilla"` and
    `"non-saturating"` are two names of one loss, `-log D(real)` and `-log(1 - D(fake))` with `D` the sigmoid of the
    logit (Goodfellow et al., arXiv 1406.2661): the saturation that the second one avoids is the generator's.

    The released LlamaGen code differs for `"non-saturating"`: it gives the constant targets to
    `binary_cross_entropy_with_logits` as its logits and the logits as its targets. What remains is
    `log(1 + e) - real` without a bound, and `log 2` for reconstructed images, which teaches the discriminator
    nothing about them. Its `"hinge"` and `"vanilla"` are the same as here.

    Args:
        kind (`str`): `"hinge"`, `"vanilla"` or `"non-saturating"`.
        real_logits (`torch.Tensor`): The discriminator's logits of real images, of any shape.
        fake_logits (`torch.Tensor`): Its logits of reconstructed images.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        ValueError: The kind is none of these.
    """
    if kind == "hinge":
        real, fake = F.relu(1 - real_logits), F.relu(1 + fake_logits)
    elif kind in ("vanilla", "non-saturating"):
        real, fake = F.softplus(-real_logits), F.softplus(fake_logits)
    else:
        raise ValueError(f"`kind` is {kind!r}; expected 'hinge', 'vanilla' or 'non-saturating'.")
    return (real.mean() + fake.mean()) / 2


def generator_loss(kind: str, fake_logits: torch.Tensor) -> torch.Tensor:
    """The tokenizer's adversarial loss, low where the discriminator takes its reconstructions for real.

    `"hinge"` is `-fake`. `"non-saturating"` is `-log D(fake)` (Goodfellow et al., arXiv 1406.2661, section 3), the
    partner of the discriminator's `"vanilla"` and `"non-saturating"`. For it the released LlamaGen code, with logits
    and targets exchanged as in [`discriminator_loss`], minimises `log(1 + e) - fake`, whose gradient is the hinge's.

    Args:
        kind (`str`): `"hinge"` or `"non-saturating"`.
        fake_logits (`torch.Tensor`): The discriminator's logits of reconstructed images, of any shape.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        ValueError: The kind is neither of these.
    """
    if kind == "hinge":
        return -fake_logits.mean()
    if kind == "non-saturating":
        return F.softplus(-fake_logits).mean()
    raise ValueError(f"`kind` is {kind!r}; expected 'hinge' or 'non-saturating'.")


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """The weight that makes the adversarial loss pull as hard as the reconstruction loss on the decoder's last layer.

    The ratio of the gradients' norms, `|d reconstruction| / (|d adversarial| + 1e-4)`, at most 1e4: equation 7 of
    VQGAN (arXiv 2012.09841) with the constant of its code, where the paper has 1e-6. Both graphs are kept for the
    backward pass that follows. Each process has its own images and so its own weight.

    Args:
        reconstruction_loss (`torch.Tensor`, scalar): Pixel and perceptual losses.
        adversarial_loss (`torch.Tensor`, scalar): The value of [`generator_loss`].
        last_layer (`torch.Tensor`): Weight of the decoder's last convolution.

    Returns:
        `torch.Tensor`: A scalar in [0, 1e4] without a gradient.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)


class PatchGANDiscriminator(nn.Module):
    """One logit for each overlapping patch of an image: pix2pix's (arXiv 1611.07004), with VQGAN's sizes.

    Each of `num_layers` convolutions halves the sides; with three, a logit sees 70x70 pixels.

    Args:
        width (`int`, *optional*, defaults to 64): Channels of the first convolution; later up to eight times more.
        num_layers (`int`, *optional*, defaults to 3): Convolutions of stride 2.
    """

    def __init__(self, width: int = 64, num_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(batch, 3, height, width)` in [-1, 1] to logits `(batch, 1, rows, columns)`."""
        return self.main(images)


class StyleGANDiscriminator(nn.Module):
    """One logit for a whole image: the residual discriminator of StyleGAN2 (arXiv 1912.04958) in MaskGIT's form.

    That form (arXiv 2202.04200), which LlamaGen's training code offers too, has neither equalised learning rates nor
    the minibatch standard deviation.

    Args:
        image_size (`int`): Side of the images in pixels, a power of two.
        width (`int`, *optional*, defaults to 512):
            Channels of the levels of 32x32 pixels and below; each level above has half as many as the next one down.

    Raises:
        ValueError: `image_size` is not a power of two between 16 and 1024.
    """

    def __init__(self, image_size: int, width: int = 512):
        super().__init__()
        sizes = [2**i for i in range(10, 1, -1)]
        if image_size not in sizes[:-2]:
            raise ValueError(f"`image_size` is {image_size}; expected a power of two between 16 and 1024.")
        widths = [width * 32 // max(size, 32) for size in sizes[sizes.index(image_size) :]]
        self.blocks = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            *(ResidualDownBlock(before, after) for before, after in pairwise(widths)),
        )
        self.final_conv = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2, inplace=True))
        self.final_linear = nn.Sequential(
            nn.Linear(width * 4 * 4, width), nn.LeakyReLU(0.2, inplace=True), nn.Linear(width, 1)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(batch, 3, image_size, image_size)` in [-1, 1] to logits `(batch, 1)`."""
        return self.final_linear(self.final_conv(self.blocks(images)).flatten(1))


class ResidualDownBlock(nn.Module):
    """Two convolutions and a blurred halving of the sides, beside a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The sum of two parts of variance 1 has variance 2.
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class Blur(nn.Module):
    """Each channel smoothed by [1, 2, 1] / 4 along both axes, mirrored at the border, so that strides do not alias."""

    def __init__(self):
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))  # saved under this name in the released checkpoints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel = torch.outer(self.f, self.f) / self.f.sum() ** 2
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(x, kernel.to(x.dtype).expand(x.shape[1], 1, 3, 3), groups=x.shape[1])


def build_discriminator(kind: str, image_size: int, width: int | None = None) -> nn.Module:
    """Build a discriminator with new weights for square images.

    Args:
        kind (`str`): `"patchgan"` for [`PatchGANDiscriminator`] or `"stylegan"` for [`StyleGANDiscriminator`].
        image_size (`int`): Side of the images in pixels.
        width (`int`, *optional*): Its `width`; its own default by default.

    Raises:
        ValueError: The kind is neither of these, or can't take images of this size.
    """
    width_argument = {} if width is None else {"width": width}
    if kind == "stylegan":
        return StyleGANDiscriminator(image_size, **width_argument)
    if kind == "patchgan":
        if image_size < 24:
            raise ValueError(f"`image_size` is {image_size}; a PatchGAN discriminator takes 24 pixels a side or more.")
        return PatchGANDiscriminator(**width_argument)
    raise ValueError(f"`kind` is {kind!r}; expected 'patchgan' or 'stylegan'.")
