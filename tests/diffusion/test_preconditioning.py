import pytest
import torch
from tiny import generators
from tiny_diffusion import build_diffusion_pipeline

from llamagen_hf.diffusion.preconditioning import DETAIL_STD, IMAGE_STD, linear_guess
from llamagen_hf.diffusion.schedules import augment, enlarge, training_scheduler
from llamagen_hf.diffusion.training.diffusion_loss import prediction_target


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("timestep, aug_level", [(0, 0.0), (500, 0.0), (100, 0.2), (700, 0.5), (999, 1.0)])
def test_the_guess_is_the_best_where_pixels_are_normal(prediction_type, timestep, aug_level):
    """What is left has a mean of 0 and a deviation of 1, and depends on neither of the two images."""
    scheduler, shape = training_scheduler(prediction_type), (40_000, 1, 1, 1)
    enlarged = IMAGE_STD * torch.randn(shape)
    images, noise = enlarged + DETAIL_STD * torch.randn(shape), torch.randn(shape)
    timesteps, aug_levels = torch.full(shape[:1], timestep), torch.full(shape[:1], aug_level)
    noisy = scheduler.add_noise(images, noise, timesteps)
    small = augment(scheduler, enlarged, torch.randn(shape), aug_levels)

    guess, scale = linear_guess(scheduler, noisy, timesteps, small, aug_levels)
    left = (prediction_target(scheduler, images, noise, timesteps) - guess) / scale
    assert left.mean().abs() < 0.03
    assert (left.std() - 1).abs() < 0.03
    both = torch.stack([each.flatten() for each in (left, noisy, small)])
    assert torch.corrcoef(both)[0, 1:].abs().max() < 0.03


def test_a_guess_is_of_its_own_image_alone():
    scheduler, noisy, small = training_scheduler(), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    timesteps, aug_levels = torch.tensor([10, 600]), torch.tensor([0.7, 0.1])
    guess, scale = linear_guess(scheduler, noisy, timesteps, small, aug_levels)
    for i in range(2):
        alone = linear_guess(scheduler, noisy[i : i + 1], timesteps[i], small[i : i + 1], aug_levels[i : i + 1])
        torch.testing.assert_close(alone, (guess[i : i + 1], scale[i : i + 1]))


def test_an_upsampler_that_corrects_nothing_draws_the_enlarged_image():
    pipe = build_diffusion_pipeline(text=False, upsamples=True)
    for parameter in pipe.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    small = torch.rand(2, 3, 8, 8)
    images = pipe(
        image=small, aug_level=0.0, num_inference_steps=20, generator=generators(0, 1), output_type="pt"
    ).images
    expected = (enlarge(2 * small - 1, 16) + 1) / 2
    assert (images - expected).square().mean().sqrt() < DETAIL_STD / 2  # a deviation in [-1, 1] is half that in [0, 1]
