"""How well small images are enlarged, beside bicubic enlargement."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from .reconstruction import PerceptualLoss, ReconstructionMetrics, psnr


MAX_CONSISTENCY = 60.0  # dB, about what a rounding to 8 bits leaves


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
        `dict[str, float]`: `psnr` in dB, `ssim`, `lpips`, and `consistency`, which is the PSNR in dB of the enlarged
        image, reduced again, against the small one. The same of bicubic enlargement as `psnr_bicubic` and so on.
    """
    own, bicubic = (ReconstructionMetrics(None, device, perceptual_loss) for _ in range(2))
    consistency = torch.zeros(3, dtype=torch.float64, device=device)  # number of images, sum of each kind
    for small, sample, images in batches:
        rival = enlarge_bicubically(small, images.shape[-1])
        own.add(images, sample)
        bicubic.add(images, rival)
        sums = [measure_consistency(small, large).sum() for large in (sample, rival)]
        consistency += torch.stack([consistency.new_tensor(len(small)), *(each.double() for each in sums)])
    if accelerator is not None:
        own.reduce(accelerator)
        bicubic.reduce(accelerator)
        consistency = accelerator.reduce(consistency)
    means = (consistency[1:] / consistency[0]).tolist()
    found = zip(("", "_bicubic"), (own, bicubic), means, strict=True)
    return {
        f"{name}{kind}": value
        for kind, metrics, mean in found
        for name, value in (metrics.compute() | {"consistency": mean}).items()
    }


def enlarge_bicubically(small: torch.Tensor, size: int) -> torch.Tensor:
    """Images `(batch, 3, h, w)` at `(batch, 3, size, size)`, as an upsampler has to beat them."""
    return F.interpolate(small, (size, size), mode="bicubic")


def reduce_images(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images at `(batch, 3, size, size)`: means over squares of pixels."""
    return F.interpolate(images, (size, size), mode="area")


def measure_consistency(small: torch.Tensor, large: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of images `(batch, 3, height, width)`, reduced again, against those they were made of: `(batch,)`.

    An image that becomes exactly the small one again has 60 dB, not infinitely many, which would hide all others.
    """
    reduced = reduce_images(large.float().clamp(-1, 1), small.shape[-1])
    return psnr((reduced + 1) / 2, (small.float() + 1) / 2).clamp(max=MAX_CONSISTENCY)
