"""What the training of an image tokenizer minimises: errors of pixels, and the adversarial part of a VQGAN's loss."""

import torch
import torch.nn.functional as F

from .vq_config import TokenizerTrainingConfig


def reconstruction_loss(sample: torch.Tensor, images: torch.Tensor, config: TokenizerTrainingConfig) -> torch.Tensor:
    """L1, L2 and the L1 error of horizontal and vertical neighbour differences, which keeps edges sharp."""
    error = sample.float() - images
    loss = config.l1_weight * error.abs().mean() + config.l2_weight * error.square().mean()
    if config.gradient_weight:
        gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + config.gradient_weight * gradients
    return loss


def discriminator_loss(kind: str, real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """What the discriminator minimises: the mean of its losses on real and on reconstructed images.

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
        ValueError: If the kind is none of these.
    """
    if kind == "hinge":
        real, fake = F.relu(1 - real_logits), F.relu(1 + fake_logits)
    elif kind in ("vanilla", "non-saturating"):
        real, fake = F.softplus(-real_logits), F.softplus(fake_logits)
    else:
        raise ValueError(f"`kind` is {kind!r}; expected 'hinge', 'vanilla' or 'non-saturating'.")
    return (real.mean() + fake.mean()) / 2


def generator_loss(kind: str, fake_logits: torch.Tensor) -> torch.Tensor:
    """What the tokenizer minimises, so that the discriminator takes its reconstructions for real.

    `"hinge"` is `-fake`. `"non-saturating"` is `-log D(fake)` (Goodfellow et al., arXiv 1406.2661, section 3), the
    partner of the discriminator's `"vanilla"` and `"non-saturating"`. For it the released LlamaGen code, with logits
    and targets exchanged as in [`discriminator_loss`], minimises `log(1 + e) - fake`, whose gradient is the hinge's.

    Args:
        kind (`str`): `"hinge"` or `"non-saturating"`.
        fake_logits (`torch.Tensor`): The discriminator's logits of reconstructed images, of any shape.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        ValueError: If the kind is neither.
    """
    if kind == "hinge":
        return -fake_logits.mean()
    if kind == "non-saturating":
        return F.softplus(-fake_logits).mean()
    raise ValueError(f"`kind` is {kind!r}; expected 'hinge' or 'non-saturating'.")


def adaptive_weight(
    reconstruction_loss: torch.Tensor, adversarial_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """Weight that makes the adversarial loss pull as hard as the reconstruction loss on the decoder's last layer.

    The ratio of the gradients' norms, `|d reconstruction| / (|d adversarial| + 1e-4)`, at most 1e4: equation 7 of
    VQGAN (arXiv 2012.09841) with the constant of its code, where the paper has 1e-6. Both graphs are kept for the
    backward pass that follows. Each process has its own images and so its own weight.

    Args:
        reconstruction_loss (`torch.Tensor`, scalar): Pixel and perceptual losses.
        adversarial_loss (`torch.Tensor`, scalar): What [`generator_loss`] gave.
        last_layer (`torch.Tensor`): Weight of the decoder's last convolution.

    Returns:
        `torch.Tensor`: A scalar in [0, 1e4] without a gradient.
    """
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4)
