"""What an upsampler knows before its U-Net is asked: a linear guess at the image, which the U-Net corrects."""

import torch
from diffusers import SchedulerMixin

from .schedules import level_timesteps


# Standard deviations in [-1, 1]: of the pixels of images (the `sigma_data` of arXiv 2206.00364), and of what separates
# an image from a small one that was enlarged.
IMAGE_STD, DETAIL_STD = 0.5, 0.1


def linear_guess(
    scheduler: SchedulerMixin,
    noisy: torch.Tensor,
    timesteps: torch.LongTensor,
    small: torch.Tensor,
    aug_level: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What can be predicted of noisy images without a U-Net, from them and from the small images.

    Both are the image with normal noise, the small one also without its details. If the pixels and their details were
    normal too, the guess at the image were the best possible, and `scale` the standard deviation of its error. A U-Net
    that predicts `(prediction - guess) / scale` starts from the enlarged image and has a target of one size at all
    noise levels (preconditioning, arXiv 2206.00364, section 5, whose guess knows no small image).

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): The noise schedule, and what is predicted.
        noisy (`torch.Tensor` of shape `(batch, 3, height, width)`): Noisy images.
        timesteps (`torch.LongTensor` of shape `(batch,)` or `()`): Their place in the schedule, from 0 to 999.
        small (`torch.Tensor` of shape `(batch, 3, height, width)`): Small images, enlarged and noisy, see
            [`~llamagen_hf.diffusion.schedules.augment`].
        aug_level (`torch.Tensor` of shape `(batch,)`): The level of the noise in them, in [0, 1].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The guess `(batch, 3, height, width)` and its scale, which broadcasts to
        it, both of what the scheduler's `prediction_type` says.
    """
    alphas = scheduler.alphas_cumprod.to(noisy.device)
    signal, spread = _signal_and_spread(alphas[timesteps.to(noisy.device).long()])
    small_signal, small_spread = _signal_and_spread(alphas[level_timesteps(aug_level).to(noisy.device)])
    # From the small image alone: mean and variance of the image.
    certainty = IMAGE_STD**2 / (small_signal**2 * IMAGE_STD**2 + small_spread**2)
    mean, variance = small_signal * certainty * small, small_spread**2 * certainty + DETAIL_STD**2
    # With what the noisy image says.
    noisy_variance = signal**2 * variance + spread**2
    images = mean + signal * variance / noisy_variance * (noisy - signal * mean)
    error = (variance / noisy_variance).sqrt()  # of the velocity
    if scheduler.config.prediction_type == "sample":
        return images, spread * error
    if scheduler.config.prediction_type == "epsilon":
        return (noisy - signal * images) / spread, signal * error
    return (signal * noisy - images) / spread, error


def _signal_and_spread(alphas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the image, and standard deviation of the noise, as `(batch, 1, 1, 1)`."""
    alphas = alphas.reshape(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()
