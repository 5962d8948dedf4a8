"""Schedules: training and sampling share one, thresholding is the paper's, schedulers that do not fit are refused."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from llamagen_hf.diffusion.schedules import (
    augment,
    check_scheduler,
    enlarge,
    level_timesteps,
    sampling_scheduler,
    training_scheduler,
    with_thresholding,
)


def test_training_and_sampling_share_a_schedule(tmp_path):
    sampling_scheduler().save_pretrained(tmp_path)
    saved = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert torch.allclose(saved.alphas_cumprod, training_scheduler().alphas_cumprod)
    assert saved.config.prediction_type == training_scheduler().config.prediction_type == "v_prediction"
    saved.set_timesteps(20)
    assert saved.timesteps[0] == 999


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_dynamic_thresholding_is_the_papers(kind):
    scheduler = with_thresholding(kind.from_config(sampling_scheduler("sample").config), "dynamic")
    scheduler.set_timesteps(2)
    images = torch.randn(3, 3, 8, 8) * torch.tensor([0.1, 1.0, 20.0])[:, None, None, None]
    limit = images.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)[:, None, None, None]
    expected = images.clamp(-limit, limit) / limit
    assert torch.equal(scheduler._threshold_sample(images), expected)
    assert not torch.equal(expected, images.clamp(-1, 1))
    for thresholding, thresholded in (("static", images.clamp(-1, 1)), ("dynamic", expected), ("none", images)):
        scheduler = with_thresholding(scheduler, thresholding)
        scheduler.set_timesteps(1)
        last = scheduler.step(images, scheduler.timesteps[-1], torch.zeros_like(images)).prev_sample
        if kind is DPMSolverMultistepScheduler:  # one step to no noise at all: the predicted image itself
            assert torch.allclose(last, thresholded, atol=1e-5)


def test_thresholding_leaves_the_given_scheduler_alone():
    scheduler = sampling_scheduler(thresholding="none")
    with_thresholding(scheduler, "dynamic")
    assert not scheduler.config.thresholding
    assert with_thresholding(scheduler) is not scheduler


def test_levels_of_noise():
    assert level_timesteps(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 250, 999]
    images, noise = torch.ones(3, 3, 64, 64), torch.randn(3, 3, 64, 64)
    noisy = augment(sampling_scheduler(), images, noise, torch.tensor([0.0, 0.5, 1.0]))
    assert (noisy[0] - 1).std() < 0.01 and torch.allclose(noisy[2], noise[2], atol=1e-3)
    expected = training_scheduler().add_noise(images, noise, torch.tensor([0, 500, 999]))
    assert torch.equal(noisy, expected)


def test_images_are_enlarged_within_their_range():
    images = torch.rand(2, 3, 4, 4).round() * 2 - 1
    assert enlarge(images, 16).shape == (2, 3, 16, 16)
    assert enlarge(images, 16).abs().max() <= 1
    assert torch.equal(enlarge(images, 16, "bilinear")[..., 0, 0], images[..., 0, 0])


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (FlowMatchEulerDiscreteScheduler(), "expected a scheduler with 1000 steps of `alphas_cumprod`"),
        (DDPMScheduler(variance_type="learned_range"), "this U-Net predicts no variance"),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "expects 'epsilon', but the U-Net predicts 'v_prediction'"),
        (DDIMScheduler(prediction_type="v_prediction"), "its noise schedule is another than the U-Net's"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler, learns_variance=False, trained=sampling_scheduler())


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_others_of_the_same_schedule_fit(kind):
    scheduler = kind.from_config(sampling_scheduler().config)
    check_scheduler(scheduler, learns_variance=False, trained=sampling_scheduler())
    if kind is EulerDiscreteScheduler:
        with pytest.raises(ValueError, match="EulerDiscreteScheduler has no thresholding"):
            with_thresholding(scheduler, "dynamic")
