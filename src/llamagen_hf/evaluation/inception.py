"""The features behind the metrics of papers: TensorFlow's Inception of 2015, as torch-fidelity computes it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch


SPATIAL_CHANNELS = 7  # the channels of the first branch of Inception's block mixed_6 that ADM uses for sFID


@dataclass
class ImageFeatures:
    """The features of a batch that metrics are computed from.

    Args:
        pool (`torch.Tensor` of shape `(n, d)`): One vector per image, for FID, KID, precision and recall.
        spatial (`torch.Tensor` of shape `(n, e)`, *optional*): Features that keep positions, for sFID.
        logits (`torch.Tensor` of shape `(n, classes)`, *optional*): A classifier's logits, for the Inception Score.
    """

    pool: torch.Tensor
    spatial: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class FeatureExtractor(Protocol):
    """Turns images into features. `fingerprint` changes whenever the features do."""

    fingerprint: str

    def __call__(self, images: np.ndarray) -> ImageFeatures:
        """Features of images `(n, height, width, 3)`, uint8."""


class InceptionFeatures:
    """Inception's features as ADM's `evaluator.py` takes them from TensorFlow's graph.

    Network, weights and the resize to 299 pixels are torch-fidelity's, which equal TensorFlow's. The features of
    `mixed_6/conv` are added for sFID: 7 channels at 17 x 17 positions. The logits have no bias, as ADM's.

    Args:
        weights (`str` or `os.PathLike`, *optional*): A file with Inception's weights in torch-fidelity's layout,
            `weights-inception-2015-12-05-6726825d.pth`. By default torch-fidelity downloads it once.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to compute.

    Raises:
        ImportError: If torch-fidelity, or torchvision which it imports, is not installed.
        OSError: If the weights can't be read or downloaded.
    """

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
            raise ImportError(
                f"Inception needs torch-fidelity and a torchvision that fits torch ({error}); "
                "`pip install torch-fidelity`."
            ) from error
        if weights is not None:
            try:  # torch-fidelity would run code in the file
                torch.load(weights, map_location="cpu", weights_only=True)
            except Exception as error:
                raise OSError(f"{str(weights)!r} holds no weights of Inception: {error}") from error
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            ).to(device)
        except RuntimeError as error:
            raise OSError(
                f"{str(weights)!r} holds other weights than Inception's in torch-fidelity's layout."
            ) from error
        except OSError as error:
            raise OSError(
                f"Inception's weights can't be downloaded ({error}); get the file elsewhere and pass its path."
            ) from error
        self.device = device
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        digest = hashlib.sha256()
        for name, value in self.network.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        self.fingerprint = f"inception-{digest.hexdigest()}"

    def _keep(self, module, inputs, output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> ImageFeatures:
        """Features of images `(n, height, width, 3)`, uint8: 2048 pooled, 2023 spatial, and 1008 logits per image."""
        pool, logits = self.network(torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device))
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)  # in TensorFlow's order
        return ImageFeatures(pool.cpu(), spatial.float().cpu(), logits.cpu())
