"""How well small images are enlarged, beside bicubic enlargement."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from .reconstruction import PerceptualLoss, ReconstructionMetrics


class Enlarged(NamedTuple):
    """Images that an upsampler has enlarged.

    Args:
        small (`torch.Tensor` of shape `(batch, 3, h, w)`): What it was given, in [-1, 1].
        sample (`torch.Tensor` of shape `(batch, 3, height, width)`): What it made of that, nominally in [-1, 1].
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): What it should have become, in [-1, 1].
    """

    small: torch.Tensor
    sample: torch.Tensor
    images: torch.Tensor


@torch.no_grad()
def evaluate_upsampling(
    batches: Iterable[Enlarged],
    device: torch.device,
    perceptual_loss: PerceptualLoss | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Measure enlarged images against large ones, means over single images.

    Args:
        batches (`Iterable[Enlarged]`): The images; those of this process, if there are several.
        device (`torch.device`): Where they are.
        perceptual_loss ([`~llamagen_hf.evaluation.reconstruction.PerceptualLoss`], *optional*): Adds LPIPS.
        accelerator ([`~accelerate.Accelerator`], *optional*): Adds up the results of several processes.

    Returns:
        `dict[str, float]`: `psnr` in dB, `ssim` and `lpips`, and the same of bicubic enlargement, as `psnr_bicubic`,
        `ssim_bicubic` and `lpips_bicubic`.
    """
    own, bicubic = (ReconstructionMetrics(None, device, perceptual_loss) for _ in range(2))
    for small, sample, images in batches:
        own.add(images, sample)
        bicubic.add(images, F.interpolate(small, images.shape[-2:], mode="bicubic"))
    if accelerator is not None:
        own.reduce(accelerator)
        bicubic.reduce(accelerator)
    return own.compute() | {f"{name}_bicubic": value for name, value in bicubic.compute().items()}
