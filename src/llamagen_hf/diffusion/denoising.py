"""The denoising loop: from noise to images, one step of a scheduler after the other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel

from .preconditioning import linear_guess
from .schedules import STATIC, Thresholding, check_scheduler, reads_variance, with_thresholding
from .unet import learns_variance, predict


# From noisy images `(batch, 3, height, width)`, their timestep, the images that are predicted from them, and the share
# of the image in their variance (`alphas_cumprod`), to the gradient of a log probability at the noisy images.
Guide = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass
class DenoisingStep:
    """A step of [`denoise`]. What is changed in it holds for the steps that follow.

    Args:
        index (`int`): Its place, from 0.
        num_steps (`int`): How many steps there are.
        timestep (`torch.Tensor`): Its place in the noise schedule.
        sample (`torch.Tensor` of shape `(batch, 3, height, width)`): What is to be denoised next; after the last step
            the images, nominally in [-1, 1].
        guidance_scale (`float`): Strength of classifier-free guidance.
        noisy, output (`torch.Tensor` of shape `(batch, 3, height, width)`): What the U-Net read, and its prediction.
        scheduler ([`~diffusers.SchedulerMixin`]): The scheduler that takes the steps.
    """

    index: int
    num_steps: int
    timestep: torch.Tensor
    sample: torch.Tensor
    guidance_scale: float
    noisy: torch.Tensor
    output: torch.Tensor
    scheduler: SchedulerMixin

    @property
    def predicted(self) -> torch.Tensor:
        """The images `(batch, 3, height, width)` that the U-Net predicts at this step, thresholded."""
        return predicted_images(self.scheduler, self.noisy, self.output, self.timestep, thresholded=True)


@torch.no_grad()
def denoise(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    num_inference_steps: int,
    *,
    states: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    null_states: torch.Tensor | None = None,
    null_mask: torch.Tensor | None = None,
    small: torch.Tensor | None = None,
    aug_level: torch.Tensor | None = None,
    corrects_guess: bool = False,
    guidance_scale: float = 1.0,
    thresholding: Thresholding | None = None,
    guide: Guide | None = None,
    generators: list[torch.Generator] | None = None,
) -> Iterator[DenoisingStep]:
    """Turn noise into images, step by step. Neither U-Net nor scheduler is changed.

    Args:
        unet ([`~diffusers.UNet2DConditionModel`]): A pixel diffusion U-Net, DeepFloyd IF's among them.
        scheduler ([`~diffusers.SchedulerMixin`]): Any with the noise schedule of the training.
        noise (`torch.Tensor` of shape `(batch, 3, height, width)`):
            Normal noise, float32. If it is in the format `torch.channels_last`, so is the input of the U-Net.
        num_inference_steps (`int`): How many steps the scheduler spreads over its schedule.
        states, mask, small, aug_level (`torch.Tensor`, *optional*): As for [`~llamagen_hf.diffusion.unet.predict`].
        corrects_guess (`bool`, *optional*, defaults to `False`):
            Whether the U-Net of an upsampler predicts what is left by
            [`~llamagen_hf.diffusion.preconditioning.linear_guess`].
        null_states, null_mask (`torch.Tensor`, *optional*): States and mask without the condition, for guidance.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Strength of classifier-free guidance (arXiv 2207.12598), with Imagen's parametrisation. 1 turns it off
            and halves the work.
        thresholding (`str`, *optional*): See [`~llamagen_hf.diffusion.schedules.with_thresholding`].
        guide (`Callable`, *optional*):
            Adds to the score (arXiv 2105.05233, algorithm 2): `guide(noisy, timestep, images, alpha)` returns the
            gradient of log p(y | x) with respect to the noisy images x, of variance 1 with the share `alpha` of the
            image. `images` are those that the U-Net predicts, thresholded. See [`~llamagen_hf.diffusion.guides`].
        generators (`list[torch.Generator]`, *optional*): One for each image, for schedulers that add noise.

    Yields:
        [`DenoisingStep`]: Each step, after it was taken.

    Raises:
        ValueError: If the scheduler does not fit.
    """
    scheduler = with_thresholding(scheduler, thresholding)
    if scheduler.config.get("thresholding") and scheduler.config.sample_max_value == STATIC:
        # The same without the quantile, which is limited to 1 anyway, and takes twice as long as the rest of the loop.
        scheduler._threshold_sample = clip
    check_scheduler(scheduler, learns_variance(unet))
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    known = signature(scheduler.step).parameters
    options = {"generator": generators} if "generator" in known else {}
    is_channels_last = noise.is_contiguous(memory_format=torch.channels_last) and not noise.is_contiguous()
    memory_format = torch.channels_last if is_channels_last else torch.preserve_format
    condition = {"states": states, "mask": mask, "small": small, "aug_level": aug_level}
    # The unconditional half comes first.
    both = {name: value if value is None else torch.cat([value, value]) for name, value in condition.items()}
    if null_states is not None:
        both["states"] = torch.cat([null_states, states])
        both["mask"] = None if mask is None else torch.cat([null_mask, mask])

    sample, steps = noise * scheduler.init_noise_sigma, scheduler.timesteps
    for index, timestep in enumerate(steps):
        # In the precision of the weights, whatever the context of the caller.
        with torch.autocast(noise.device.type, enabled=False):
            noisy = scheduler.scale_model_input(sample, timestep)
            is_guided = null_states is not None and guidance_scale != 1
            inputs = torch.cat([noisy, noisy]) if is_guided else noisy
            output = predict(unet, inputs, timestep, **both if is_guided else condition, memory_format=memory_format)
            output = output.float()
            output, variance = output[:, :3], output[:, 3:]
            if is_guided:
                null, output = output.chunk(2)
                output, variance = null + guidance_scale * (output - null), variance.chunk(2)[1]
            if corrects_guess and small is not None:
                guess, scale = linear_guess(scheduler, noisy, timestep, small, aug_level)
                output = guess + scale * output
            if guide is not None:
                images = predicted_images(scheduler, noisy, output, timestep, thresholded=True)
                gradient = guide(noisy, timestep, images, _alpha(scheduler, timestep))
                output = shifted_by(scheduler, output, gradient, timestep)
            full = torch.cat([output, variance], dim=1) if reads_variance(scheduler) else output
            sample = scheduler.step(full, timestep, sample, **options, return_dict=False)[0]
        step = DenoisingStep(index, len(steps), timestep, sample, guidance_scale, noisy, output, scheduler)
        yield step
        sample, guidance_scale = step.sample, step.guidance_scale


def clip(images: torch.Tensor) -> torch.Tensor:
    """Static thresholding."""
    return images.clamp(-1, 1)


def skip_noise(
    scheduler: SchedulerMixin, noise: torch.Tensor, num_inference_steps: int, generators: list[torch.Generator]
) -> None:
    """Draw from generators what [`denoise`] draws on the way, which is nothing with most schedulers.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): The scheduler.
        noise (`torch.Tensor` of shape `(batch, 3, height, width)`): What the steps start from.
        num_inference_steps (`int`): How many there are.
        generators (`list[torch.Generator]`): One for each image.
    """
    if "generator" not in signature(scheduler.step).parameters:
        return
    scheduler, nothing = with_thresholding(scheduler, None), torch.zeros_like(noise)
    scheduler.set_timesteps(num_inference_steps)
    output = nothing.repeat(1, 2, 1, 1) if reads_variance(scheduler) else nothing
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(nothing, timestep)  # some schedulers warn without
        scheduler.step(output, timestep, nothing, generator=generators)


def predicted_images(
    scheduler: SchedulerMixin,
    noisy: torch.Tensor,
    output: torch.Tensor,
    timestep: torch.Tensor,
    thresholded: bool = False,
) -> torch.Tensor:
    """The images that a prediction stands for.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): Says what is predicted.
        noisy (`torch.Tensor` of shape `(batch, 3, height, width)`): What the U-Net read.
        output (`torch.Tensor` of the same shape): What it predicts.
        timestep (`torch.Tensor`): Place in the noise schedule.
        thresholded (`bool`, *optional*, defaults to `False`): Treat them as the scheduler does, if it does.
    """
    signal, spread = _signal_and_spread(scheduler, timestep)
    if scheduler.config.prediction_type == "epsilon":
        images = (noisy - spread * output) / signal
    else:
        images = output if scheduler.config.prediction_type == "sample" else signal * noisy - spread * output
    return scheduler._threshold_sample(images) if thresholded and scheduler.config.get("thresholding") else images


def shifted_by(
    scheduler: SchedulerMixin, output: torch.Tensor, gradient: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """A prediction whose score is the old one plus `gradient`, that of a log probability at the noisy images.

    The score is the predicted noise divided by minus its standard deviation.
    """
    signal, spread = _signal_and_spread(scheduler, timestep)
    if scheduler.config.prediction_type == "epsilon":
        return output - spread * gradient
    if scheduler.config.prediction_type == "sample":
        return output + spread**2 / signal * gradient
    return output - spread / signal * gradient


def _signal_and_spread(scheduler: SchedulerMixin, timestep: torch.Tensor) -> tuple[float, float]:
    """Share of the image, and standard deviation of the noise, in what the U-Net reads."""
    alpha = _alpha(scheduler, timestep)
    return alpha**0.5, (1 - alpha) ** 0.5


def _alpha(scheduler: SchedulerMixin, timestep: torch.Tensor) -> float:
    """Share of the image in the variance of what the U-Net reads."""
    return float(scheduler.alphas_cumprod[int(timestep)])  # some schedulers have steps between two others
