"""LPIPS, the perceptual distance between two images (Zhang et al. 2018, arXiv 1801.03924), on VGG16's features."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file


# Width and number of the 3x3 convolutions of each level of VGG16 (arXiv 1409.1556, table 1, D), halved in between.
VGG16_LEVELS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class PerceptualLoss(nn.Module):
    """How different two images look: squared differences between their VGG16 features.

    At the last ReLU of each of VGG16's five levels, the feature vector of every position is scaled to unit length; the
    squared differences are summed over channels with the level's weights and averaged over positions; the five
    levels add up (equation 1 of the paper). Weights never train, and no layer differs between `train()` and `eval()`.

    A new one is for tests: it has random features, and weights of 1, which make each level twice its cosine distance.
    [`~PerceptualLoss.from_pretrained`] loads the real one.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf.evaluation.perceptual import PerceptualLoss

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
        """LPIPS as published, version 0.1.

        VGG16's weights come from the Hub, a download of 0.55 GB of which a tenth is read. The weights of LPIPS itself
        come with the package torchmetrics, which needs to be installed but is not imported.

        Args:
            vgg16 (`str` or `Path`, *optional*, defaults to `"timm/vgg16.tv_in1k"`):
                Hub id or folder with a `model.safetensors` in the layout of torchvision or timm, or such a file.

        Raises:
            ImportError: If torchmetrics is not installed.
            ValueError: If the file does not hold VGG16.
            OSError: If there is no such file.
        """
        torchmetrics = find_spec("torchmetrics")
        if torchmetrics is None:
            raise ImportError("The perceptual loss reads weights that come with torchmetrics; it is not installed.")
        heads = torch.load(
            Path(torchmetrics.origin).parent / "functional/image/lpips_models/vgg.pth",
            map_location="cpu",  # they were saved on a GPU
            weights_only=True,
        )
        try:
            path = vgg16 if Path(vgg16).is_file() else cached_file(vgg16, "model.safetensors")
        except OSError as error:
            raise OSError(
                f"There is no VGG16 at {str(vgg16)!r}: no file, and no folder or reachable Hub repository with a "
                "model.safetensors."
            ) from error
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys() if name.startswith("features.")}
        weights |= {f"heads.{i}.weight": heads[f"lin{i}.model.1.weight"] for i in range(len(VGG16_LEVELS))}
        model = cls()
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path} does not hold VGG16, features.0.weight to features.28.bias.") from error
        return model

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Distance of each image to its target, in float32, under autocast too.

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
