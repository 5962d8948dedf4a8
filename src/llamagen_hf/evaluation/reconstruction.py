"""How far a reconstruction is from its image, PSNR, SSIM and LPIPS, and how much of a codebook is used."""

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.utils import cached_file


# Width and number of the 3x3 convolutions of each level of VGG16 (arXiv 1409.1556, table 1, D), halved in between.
VGG16_LEVELS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
LPIPS_HEADS = Path(__file__).with_name("lpips_heads.safetensors")  # origin and license: lpips_heads.LICENSE


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924): squared differences between the VGG16 features of two images.

    At the last ReLU of each of VGG16's five levels, the feature vector of every position is scaled to unit length; the
    squared differences are summed over channels with the level's weights and averaged over positions; the five
    levels add up (equation 1 of the paper). Weights never train, and no layer differs between `train()` and `eval()`.

    A new instance is for tests: it has random features, and weights of 1, which make each level twice its cosine
    distance. [`~PerceptualLoss.from_pretrained`] loads the published one.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf.evaluation.reconstruction import PerceptualLoss

    >>> perceptual_loss = PerceptualLoss.from_pretrained()
    >>> black, white = -torch.ones(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    >>> perceptual_loss(black, white).shape
    torch.Size([1])
    ```
    """

    def __init__(self):
        super().__init__()
        layers, self.taps, channels = [], [], 3
        for width, convs in VGG16_LEVELS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convs):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)  # the names torchvision and timm give: features.0.weight ...
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width, _ in VGG16_LEVELS)
        for head in self.heads:
            nn.init.ones_(head.weight)
        # ImageNet's mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225), for pixels in [-1, 1].
        for name, values in (("mean", (-0.030, -0.088, -0.188)), ("std", (0.458, 0.448, 0.450))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, vgg16: str | Path = "timm/vgg16.tv_in1k") -> "PerceptualLoss":
        """Load LPIPS as published, version 0.1.

        VGG16's weights come from the Hub, a download of 0.55 GB of which a tenth is read. The weights of the five
        levels are shipped with this package.

        Args:
            vgg16 (`str` or `Path`, *optional*, defaults to `"timm/vgg16.tv_in1k"`):
                Hub id or folder with a `model.safetensors` in the layout of torchvision or timm, or such a file.

        Raises:
            ValueError: If the file does not hold VGG16.
            OSError: If there is no such file.
        """
        try:
            path = vgg16 if Path(vgg16).is_file() else cached_file(vgg16, "model.safetensors")
        except OSError as error:
            raise OSError(
                f"There is no VGG16 at {str(vgg16)!r}: no file, and no folder or reachable Hub repository with a "
                "model.safetensors."
            ) from error
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys() if name.startswith("features.")}
        model = cls()
        try:
            model.load_state_dict(weights | load_file(LPIPS_HEADS))
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold VGG16, features.0.weight to features.28.bias.") from error
        return model

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Distance of each image to its target, computed in float32 even under autocast.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels in [-1, 1]; sides of 16 or more.
            targets (`torch.Tensor` of the same shape): What they should look like.

        Returns:
            `torch.Tensor` of shape `(batch,)`: 0 for equal images. Gradients reach both arguments.

        Raises:
            ValueError: If a shape does not fit.
        """
        if images.shape != targets.shape or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 16:
            raise ValueError(
                f"`images` has shape {tuple(images.shape)} and `targets` {tuple(targets.shape)}; "
                "expected twice the same (batch, 3, height, width), with sides of 16 or more."
            )
        with torch.autocast(images.device.type, enabled=False):
            levels = zip(self.heads, self._levels(images.float()), self._levels(targets.float()), strict=True)
            return sum(head((x - y).square()).mean((1, 2, 3)) for head, x, y in levels)

    def _levels(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Features of unit length at each level."""
        x = (images - self.mean) / self.std
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                # Without the constant, a position whose channels are all 0 would be NaN.
                yield x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()


def psnr(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each of `(batch, 3, height, width)` images in [0, 1]: `(batch,)`."""
    return -10 * (images - targets).square().flatten(1).mean(1).log10()


def ssim(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of `(batch, 3, height, width)` images in [0, 1]: `(batch,)`."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(images, targets, data_range=1.0, reduction="none")


class CodeCounts:
    """How often each code was used since the counts were last cleared; checkpoints of a run save and restore it."""

    def __init__(self, num_codes: int, device: torch.device):
        self.counts = torch.zeros(num_codes, dtype=torch.long, device=device)

    def add(self, codes: torch.LongTensor) -> None:
        """Count codes of any shape."""
        self.counts += codes.flatten().bincount(minlength=len(self.counts))

    @property
    def usage(self) -> float:
        """Share of the codes that were used, in [0, 1]."""
        return (self.counts > 0).float().mean().item()

    @property
    def perplexity(self) -> float:
        """Exponential of the entropy of use: the number of equally frequent codes with the same entropy."""
        share = self.counts / self.counts.sum()
        return torch.special.entr(share).sum().exp().item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The counts, for a checkpoint."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the counts of a checkpoint."""
        self.counts.copy_(state["counts"])


class ReconstructionMetrics:
    """What papers report about an image tokenizer, batch by batch: means over images, and the use of its codes.

    Args:
        num_codes (`int`, *optional*): Size of the codebook; `None` for continuous latents.
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
        pair = [(pixels + 1) / 2 for pixels in (sample, images)]
        values = [psnr(*pair), ssim(*pair)]
        if self.perceptual_loss is not None:
            values.append(self.perceptual_loss(sample, images))
        sums = [value.cpu().double().sum() for value in values]
        self.sums += torch.stack([self.sums.new_tensor(len(images)), *sums])
        if codes is not None:
            self.codes.add(codes)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums and counts of all processes."""
        if accelerator.num_processes > 1:
            self.sums = accelerator.reduce(self.sums.to(accelerator.device)).cpu()
            if self.codes is not None:
                self.codes.counts = accelerator.reduce(self.codes.counts)

    def compute(self) -> dict[str, float]:
        """`psnr` in dB, `ssim`, `lpips`, and of the codes `codebook_usage` in [0, 1] and `codebook_perplexity`."""
        metrics = dict(zip(self.names, (self.sums[1:] / self.sums[0]).tolist(), strict=True))
        if self.codes is not None:
            metrics |= {"codebook_usage": self.codes.usage, "codebook_perplexity": self.codes.perplexity}
        return metrics
