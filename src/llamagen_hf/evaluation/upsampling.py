"""How well small images are enlarged, beside bicubic enlargement."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from .reconstruction import PerceptualLoss, ReconstructionMetrics


@torch.no_grad()
def evaluate_upsampling(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    upsample: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    perceptual_loss: PerceptualLoss | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Measure enlarged images against large ones, means over single images.

    Args:
        batches (`Iterable[tuple[torch.Tensor, torch.Tensor]]`):
            Small images `(batch, 3, h, w)` and the large ones that they should become, `(batch, 3, height, width)`,
            all in [-1, 1]; those of this process, if there are several.
        upsample (`Callable`): Enlarges small images.
        device (`torch.device`): Where it does.
        perceptual_loss ([`~llamagen_hf.evaluation.reconstruction.PerceptualLoss`], *optional*): Adds LPIPS.
        accelerator ([`~accelerate.Accelerator`], *optional*): Adds up the results of several processes.

    Returns:
        `dict[str, float]`: `psnr` in dB, `ssim` and `lpips`, and the same of bicubic enlargement, as `psnr_bicubic`,
        `ssim_bicubic` and `lpips_bicubic`.
    """
    own, bicubic = (ReconstructionMetrics(None, device, perceptual_loss) for _ in range(2))
    for small, images in batches:
        own.add(images, upsample(small))
        bicubic.add(images, F.interpolate(small, images.shape[-2:], mode="bicubic"))
    if accelerator is not None:
        own.reduce(accelerator)
        bicubic.reduce(accelerator)
    return own.compute() | {f"{name}_bicubic": value for name, value in bicubic.compute().items()}
