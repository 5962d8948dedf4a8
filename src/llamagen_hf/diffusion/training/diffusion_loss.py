"""The loss of a diffusion training: how far a U-Net's prediction is from what it should have predicted."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from ..unet import predict


class DiffusionLoss(nn.Module):
    """The U-Net, and the text encoder if it is trained too, as one module for optimizer and launcher.

    Args:
        unet ([`~diffusers.UNet2DConditionModel`]): The U-Net.
        text_encoder (`torch.nn.Module`, *optional*): Encodes captions that are given as tokens.
        encode (`Callable`, *optional*): Runs it on `input_ids` and `attention_mask`; returns states and mask.
        compiles (`bool`, *optional*, defaults to `False`):
            Compile the U-Net's call in training mode. Measurements, whose batches have other shapes, stay as they are.
    """

    text_path = ("text_encoder.",)

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: nn.Module | None = None,
        encode: Callable | None = None,
        compiles: bool = False,
    ):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.encode = encode
        self.predict_in_training = torch.compile(predict) if compiles else predict

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.LongTensor,
        target: torch.Tensor,
        weights: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        **condition: torch.Tensor,
    ) -> torch.Tensor:
        """Mean squared error of the prediction.

        Args:
            noisy (`torch.Tensor` of shape `(batch, 3, height, width)`): Noisy images.
            timesteps (`torch.LongTensor` of shape `(batch,)`): Their place in the schedule, from 0 to 999.
            target (`torch.Tensor` of shape `(batch, 3, height, width)`): What to predict.
            weights (`torch.Tensor` of shape `(batch,)`): Weights of the images.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch, words)`, *optional*): Tokenized captions.
            condition (`torch.Tensor`): What else [`~llamagen_hf.diffusion.unet.predict`] takes.

        Returns:
            `torch.Tensor`: A scalar.
        """
        if input_ids is not None:
            states, mask = self.encode(self.text_encoder, input_ids, attention_mask)
            condition |= {"states": states, "mask": mask}
        call = self.predict_in_training if self.training else predict
        # Three channels: the variance, which DeepFloyd IF's U-Nets predict too, stays as it is.
        prediction = call(self.unet, noisy, timesteps, **condition, memory_format=torch.channels_last)[:, :3].float()
        errors = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
        return (weights * errors).mean()


def prediction_target(
    scheduler: DDPMScheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.LongTensor
) -> torch.Tensor:
    """What a U-Net should predict of images that the noise was added to, as the scheduler's `prediction_type` says."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(images, noise, timesteps)
    return noise if scheduler.config.prediction_type == "epsilon" else images


def min_snr_weights(scheduler: DDPMScheduler, timesteps: torch.LongTensor, gamma: float | None) -> torch.Tensor:
    """Weights of min-SNR (arXiv 2303.09556): an image's error counts by its signal-to-noise ratio, up to `gamma`.

    Args:
        scheduler ([`~diffusers.DDPMScheduler`]): Says what is predicted, and the ratio of each step.
        timesteps (`torch.LongTensor` of shape `(batch,)`): Places in the schedule.
        gamma (`float`, *optional*): The limit; without one all weights are 1.

    Returns:
        `torch.Tensor` of shape `(batch,)`: float32.
    """
    if gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    snr = compute_snr(scheduler, timesteps)
    # What an error of the image of 1 is in an error of the noise, the image, or the velocity.
    scale = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}
    return snr.clamp(max=gamma) / scale[scheduler.config.prediction_type]
