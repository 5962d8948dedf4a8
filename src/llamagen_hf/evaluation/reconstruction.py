"""How far a reconstruction is from its image, and how much of a codebook it uses: the metrics that papers quote."""

import torch
from accelerate import Accelerator

from .perceptual import PerceptualLoss


def psnr(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each of `(batch, 3, height, width)` images in [0, 1]: `(batch,)`."""
    return -10 * (images - targets).square().flatten(1).mean(1).log10()


def ssim(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of `(batch, 3, height, width)` images in [0, 1]: `(batch,)`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images, targets, data_range=1.0, reduction="none")


class CodeCounts:
    """How often each code was used since the counts were last cleared; a part of a run's checkpoints."""

    def __init__(self, num_codes: int, device: torch.device):
        self.counts = torch.zeros(num_codes, dtype=torch.long, device=device)

    def add(self, codes: torch.LongTensor) -> None:
        self.counts += codes.flatten().bincount(minlength=len(self.counts))

    @property
    def usage(self) -> float:
        """Share of the codes that were used, in [0, 1]."""
        return (self.counts > 0).float().mean().item()

    @property
    def perplexity(self) -> float:
        """Exponential of the entropy of use: as many codes, all equally often, would carry as much."""
        share = self.counts / self.counts.sum()
        return torch.special.entr(share).sum().exp().item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.counts.copy_(state["counts"])


class ReconstructionMetrics:
    """What papers report of a tokenizer, batch by batch: means over single images, and the use of its codes.

    Args:
        num_codes (`int`, *optional*): Size of the codebook; `None` for a tokenizer without.
        device (`torch.device`): Where codes are counted.
        perceptual_loss ([`PerceptualLoss`], *optional*): Adds LPIPS.
    """

    def __init__(self, num_codes: int | None, device: torch.device, perceptual_loss: PerceptualLoss | None = None):
        self.codes = None if num_codes is None else CodeCounts(num_codes, device)
        self.perceptual_loss = perceptual_loss
        self.names = ["psnr", "ssim"] + ["lpips"] * (perceptual_loss is not None)
        self.sums = torch.zeros(1 + len(self.names), dtype=torch.float64)  # the number of images, then by name

    def add(self, images: torch.Tensor, sample: torch.Tensor, codes: torch.LongTensor | None = None) -> None:
        """Add images and their reconstructions, `(batch, 3, height, width)` with pixels in [-1, 1], and codes."""
        images, sample = images.float(), sample.float().clamp(-1, 1)
        pictures = [(pixels + 1) / 2 for pixels in (sample, images)]
        values = [psnr(*pictures), ssim(*pictures)]
        if self.perceptual_loss is not None:
            values.append(self.perceptual_loss(sample, images))
        sums = [value.cpu().double().sum() for value in values]
        self.sums += torch.stack([self.sums.new_tensor(len(images)), *sums])
        if codes is not None:
            self.codes.add(codes)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up what the processes have."""
        if accelerator.num_processes > 1:
            self.sums = accelerator.reduce(self.sums.to(accelerator.device)).cpu()
            self.codes.counts = accelerator.reduce(self.codes.counts)

    def compute(self) -> dict[str, float]:
        """`psnr` in dB, `ssim` and `lpips`, and of the codes `codebook_usage` in [0, 1] and `codebook_perplexity`."""
        metrics = dict(zip(self.names, (self.sums[1:] / self.sums[0]).tolist(), strict=True))
        if self.codes is not None:
            metrics |= {"codebook_usage": self.codes.usage, "codebook_perplexity": self.codes.perplexity}
        return metrics
