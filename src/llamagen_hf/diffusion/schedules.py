"""Noise schedules: that of a training, the scheduler that samples from it, and the noise in small images."""

import math
from inspect import signature
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin


PredictionType = Literal["epsilon", "sample", "v_prediction"]
Thresholding = Literal["none", "static", "dynamic"]

NUM_TIMESTEPS = 1000
# diffusers' `sample_max_value`: larger than any quantile, or no larger than what is always allowed.
UNLIMITED, STATIC = 100.0, 1.0


def training_scheduler(prediction_type: PredictionType = "v_prediction") -> DDPMScheduler:
    """The forward process of a training: 1000 steps of the cosine schedule (arXiv 2102.09672).

    Args:
        prediction_type (`str`, *optional*, defaults to `"v_prediction"`):
            What the U-Net predicts: the noise (`"epsilon"`), the image (`"sample"`) or a mix of both
            (`"v_prediction"`, arXiv 2202.00512).
    """
    return DDPMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        clip_sample=False,
    )


def sampling_scheduler(
    prediction_type: PredictionType = "v_prediction",
    thresholding: Thresholding = "dynamic",
    dynamic_thresholding_ratio: float = 0.995,
) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ (arXiv 2211.01095) on the schedule of [`training_scheduler`], as checkpoints are saved with.

    Args:
        prediction_type (`str`, *optional*, defaults to `"v_prediction"`): As in training.
        thresholding (`str`, *optional*, defaults to `"dynamic"`): See [`with_thresholding`].
        dynamic_thresholding_ratio (`float`, *optional*, defaults to 0.995): The quantile of dynamic thresholding.
    """
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        dynamic_thresholding_ratio=dynamic_thresholding_ratio,
        # At the noisy end of the cosine schedule, predicted noise says nothing about the image.
        lambda_min_clipped=-5.1 if prediction_type == "epsilon" else -math.inf,
    )
    return with_thresholding(scheduler, thresholding)


def with_thresholding(scheduler: SchedulerMixin, thresholding: Thresholding | None = None) -> SchedulerMixin:
    """A fresh copy of a scheduler, with another treatment of predicted images that leave [-1, 1].

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): Any scheduler.
        thresholding (`str`, *optional*):
            `"none"` leaves them; `"static"` clips them; `"dynamic"` clips each image to [-s, s] and divides it by s,
            the quantile `dynamic_thresholding_ratio` of its absolute values, but at least 1 (arXiv 2205.11487,
            section 2.3). By default the scheduler's own.

    Raises:
        ValueError: If there is no such treatment, or the scheduler can't do it.
    """
    if thresholding is None:
        return type(scheduler).from_config(scheduler.config)
    if thresholding not in ("none", "static", "dynamic"):
        raise ValueError(f"`thresholding` is {thresholding!r}; expected 'none', 'static' or 'dynamic'.")
    # The configuration also keeps what a scheduler was made from and does not know.
    known = signature(type(scheduler).__init__).parameters
    if "thresholding" not in known:
        if thresholding != "none":
            raise ValueError(f"{type(scheduler).__name__} has no thresholding: pass thresholding='none'.")
        return type(scheduler).from_config(scheduler.config)
    # diffusers limits the quantile by 1 unless it is told otherwise, so that its dynamic thresholding is static.
    settings = {
        "thresholding": thresholding != "none",
        "sample_max_value": UNLIMITED if thresholding == "dynamic" else STATIC,
    }
    if "clip_sample" in known:
        settings["clip_sample"] = False
    return type(scheduler).from_config(scheduler.config, **settings)


def check_scheduler(scheduler: SchedulerMixin, learns_variance: bool, trained: SchedulerMixin | None = None) -> None:
    """Check that a scheduler can sample with a U-Net.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): The scheduler.
        learns_variance (`bool`): Whether the U-Net predicts the variance too.
        trained ([`~diffusers.SchedulerMixin`], *optional*): One that is known to fit, such as the checkpoint's.

    Raises:
        ValueError: If it does not fit.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if not hasattr(scheduler, "alphas_cumprod") or config.num_train_timesteps != NUM_TIMESTEPS:
        raise ValueError(f"{name} does not fit: expected a scheduler with {NUM_TIMESTEPS} steps of `alphas_cumprod`.")
    expected = ("epsilon", "sample", "v_prediction")
    if config.get("prediction_type") not in expected:
        raise ValueError(
            f"{name} does not fit: its `prediction_type` is {config.get('prediction_type')!r}; "
            f"expected one of {', '.join(expected)}."
        )
    if reads_variance(scheduler) and not learns_variance:
        raise ValueError(
            f"{name} does not fit: its `variance_type` is {config.variance_type!r}, but this U-Net predicts no "
            "variance; set it to 'fixed_small'."
        )
    if trained is None:
        return
    advice = f"make it by {name}.from_config(pipe.scheduler.config)"
    if config.prediction_type != trained.config.prediction_type:
        raise ValueError(
            f"{name} does not fit: it expects {config.prediction_type!r}, but the U-Net predicts "
            f"{trained.config.prediction_type!r}; {advice}."
        )
    if not torch.allclose(scheduler.alphas_cumprod.cpu(), trained.alphas_cumprod.cpu(), atol=1e-5):
        raise ValueError(f"{name} does not fit: its noise schedule is another than the U-Net's; {advice}.")


def reads_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler uses a variance that the U-Net predicts."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in ("learned", "learned_range")


def level_timesteps(aug_level: torch.Tensor) -> torch.LongTensor:
    """Levels in [0, 1] as places in the schedule, from 0 to 999."""
    return (aug_level * NUM_TIMESTEPS).round().long().clamp(max=NUM_TIMESTEPS - 1)


def enlarge(images: torch.Tensor, size: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> torch.Tensor:
    """Enlarge images to `(batch, 3, size, size)`: bicubically, or bilinearly from corner to corner as DeepFloyd IF."""
    if mode == "bilinear":
        return F.interpolate(images, (size, size), mode="bilinear", align_corners=True)
    return F.interpolate(images, (size, size), mode="bicubic").clamp(-1, 1)


def augment(
    scheduler: SchedulerMixin, images: torch.Tensor, noise: torch.Tensor, aug_level: torch.Tensor
) -> torch.Tensor:
    """Add noise to enlarged images, so that an upsampler does not rely on each of their pixels (arXiv 2106.15282).

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): A scheduler with the U-Net's noise schedule.
        images (`torch.Tensor` of shape `(batch, 3, size, size)`): Images in [-1, 1].
        noise (`torch.Tensor` of the same shape): Normal noise.
        aug_level (`torch.Tensor` of shape `(batch,)`):
            How much of it to add, in [0, 1]: 0 next to none (a standard deviation of 0.006), 1 nothing but noise.
    """
    forward = scheduler if type(scheduler) is DDPMScheduler else DDPMScheduler.from_config(scheduler.config)
    return forward.add_noise(images, noise, level_timesteps(aug_level).to(images.device))
