"""How far a reconstruction is from its picture: as a loss, and as the metrics that papers quote."""

import torch

from .tokenizer_config import TokenizerTrainingConfig


def reconstruction_loss(sample: torch.Tensor, images: torch.Tensor, config: TokenizerTrainingConfig) -> torch.Tensor:
    """L1, L2 and the L1 error of horizontal and vertical neighbour differences, which keeps edges sharp."""
    error = sample.float() - images
    loss = config.l1_weight * error.abs().mean() + config.l2_weight * error.square().mean()
    if config.gradient_weight:
        gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = loss + config.gradient_weight * gradients
    return loss


def psnr(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each of `(batch, 3, height, width)` pictures in [0, 1]: `(batch,)`."""
    return -10 * (images - targets).square().flatten(1).mean(1).log10()


def ssim(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of `(batch, 3, height, width)` pictures in [0, 1]: `(batch,)`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images, targets, data_range=1.0, reduction="none")
