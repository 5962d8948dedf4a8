"""The loop: DeepFloyd IF's to the last bit, guided as it should be, and open to changes on the way."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from tiny import generators
from tiny_diffusion import build_if_pipeline, build_unet

from llamagen_hf.diffusion import denoising
from llamagen_hf.diffusion.denoising import denoise, predicted_images
from llamagen_hf.diffusion.schedules import augment, sampling_scheduler, with_thresholding


STEPS = 4


def draw(generators: list[torch.Generator], shape=(3, 8, 8)) -> torch.Tensor:
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def finish(steps) -> torch.Tensor:
    return list(steps)[-1].sample


def if_scheduler(kind, pipe):
    if kind is DDPMScheduler:
        return pipe.scheduler
    # IFPipeline asks any scheduler for this setting, also one that does not know it.
    variance_type = "fixed_small" if kind is DDIMScheduler else None
    return kind.from_config(dict(pipe.scheduler.config) | {"variance_type": variance_type})


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler, DDIMScheduler])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0, 7.0])
@pytest.mark.parametrize("upsamples", [False, True])
def test_the_loop_is_deepfloyds_bit_for_bit(upsamples, guidance_scale, kind):
    pipe = build_if_pipeline(upsamples, text=False)
    pipe.scheduler = if_scheduler(kind, pipe)
    states, null_states = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    small = torch.rand(2, 3, 4, 4) * 2 - 1
    theirs = pipe(
        prompt_embeds=states,
        negative_prompt_embeds=null_states,
        guidance_scale=guidance_scale,
        num_inference_steps=STEPS,
        generator=generators(0, 1),
        output_type="pt",
        **{"image": small, "noise_level": 250} if upsamples else {},
    ).images

    own, given = generators(0, 1), {}
    noise = draw(own)
    if upsamples:
        enlarged = F.interpolate(small, (8, 8), mode="bilinear", align_corners=True)
        level = torch.tensor([0.25, 0.25])
        given = {"small": augment(pipe.scheduler, enlarged, draw(own), level), "aug_level": level}
    condition = {"states": states, "null_states": null_states, "guidance_scale": guidance_scale}
    ours = finish(denoise(pipe.unet, pipe.scheduler, noise, STEPS, **condition, **given, generators=own))
    assert torch.equal(ours, theirs)


def test_guidance_1_halves_the_work_and_0_is_unconditional():
    unet, noise = build_unet(condition_dim=6), draw(generators(0), (3, 16, 16))
    states, null_states, mask = torch.randn(1, 3, 6), torch.zeros(1, 3, 6), torch.ones(1, 3)
    sizes = []
    unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    def run(scale, states=states):
        condition = {"states": states, "mask": mask, "null_states": null_states, "null_mask": mask}
        return finish(denoise(unet, sampling_scheduler(), noise, STEPS, **condition, guidance_scale=scale))

    plain, guided = run(1.0), run(3.0)
    assert sizes == [1] * STEPS + [2] * STEPS
    assert not torch.equal(plain, guided)
    assert torch.allclose(run(0.0), run(1.0, null_states), atol=1e-5)


def test_thresholded_images_stay_in_range_at_strong_guidance():
    unet, noise = build_unet(condition_dim=6), draw(generators(0, 1), (3, 16, 16))
    condition = {"states": torch.randn(2, 3, 6), "null_states": torch.zeros(2, 3, 6), "guidance_scale": 30.0}

    def run(thresholding):
        steps = denoise(unet, sampling_scheduler("sample"), noise, STEPS, **condition, thresholding=thresholding)
        return [(step.predicted.abs().max().item(), step.sample.abs().max().item()) for step in steps]

    assert run("none")[-1][1] > 1.5
    for thresholding in ("static", "dynamic"):
        assert max(predicted for predicted, _ in run(thresholding)) <= 1
        assert run(thresholding)[-1][1] <= 1 + 1e-5


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_predicted_images_are_what_the_scheduler_makes_of_the_prediction(kind, prediction_type):
    scheduler = kind.from_config(sampling_scheduler(prediction_type, "none").config, timestep_spacing="trailing")
    if kind is not EulerDiscreteScheduler:
        scheduler = with_thresholding(scheduler, "none")
    noise = torch.randn(1, 3, 16, 16)
    *_, last = denoise(build_unet(), scheduler, noise, STEPS, generators=generators(0))
    if kind in (DDPMScheduler, DDIMScheduler):
        sample = last.noisy  # whose own prediction comes with each step
        theirs = last.scheduler.step(last.output, last.timestep, sample, generator=generators(0)).pred_original_sample
    else:  # whose last step leads to no noise at all
        theirs = last.sample
    assert torch.allclose(last.predicted, theirs, atol=2e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_guide_is_added_to_the_score(prediction_type):
    """With a U-Net that knows nothing, and a guide towards a colour, the score of a Gaussian around it."""
    scheduler, unet = sampling_scheduler(prediction_type, "none"), build_unet()
    noise, gradient = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    plain = next(denoise(unet, scheduler, noise, STEPS))
    seen = []

    def guide(noisy, timestep, images, alpha):
        seen.append((noisy, int(timestep), images, alpha))
        return gradient

    guided = next(denoise(unet, scheduler, noise, STEPS, guide=guide))
    assert torch.equal(seen[0][0], plain.noisy) and torch.equal(seen[0][2], plain.predicted)
    alpha = seen[0][3]
    assert alpha == float(scheduler.alphas_cumprod[seen[0][1]])
    # The image that a score stands for (Tweedie's formula): (x + (1 - alpha) score) / sqrt(alpha).
    expected = plain.predicted + (1 - alpha) / math.sqrt(alpha) * gradient
    assert torch.allclose(guided.predicted, expected, rtol=1e-3, atol=1e-3)


def test_what_is_changed_in_a_step_holds_for_those_that_follow():
    unet, noise = build_unet(condition_dim=6), draw(generators(0), (3, 16, 16))
    condition = {"states": torch.randn(1, 3, 6), "null_states": torch.zeros(1, 3, 6)}
    changed = []
    for step in denoise(unet, sampling_scheduler(), noise, STEPS, **condition, guidance_scale=3.0):
        if step.index == 1:
            step.sample, step.guidance_scale = torch.zeros_like(step.sample), 1.0
        changed.append((step.noisy.abs().max().item(), step.guidance_scale))
    assert [scale for _, scale in changed] == [3.0, 1.0, 1.0, 1.0]
    assert changed[1][0] > 0 and changed[2][0] == 0


def test_the_scheduler_of_the_caller_stays_as_it_was():
    scheduler = sampling_scheduler()
    before = scheduler.timesteps.clone()
    finish(denoise(build_unet(), scheduler, torch.randn(1, 3, 16, 16), STEPS))
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, DDPMScheduler])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_an_image_depends_on_its_own_noise_and_generator_alone(patch_size, kind):
    unet, scheduler = build_unet(patch_size=patch_size), kind.from_config(sampling_scheduler().config)
    own = generators(0, 1)
    batch = finish(denoise(unet, scheduler, draw(own, (3, 16, 16)), STEPS, generators=own))
    single = generators(1)
    one = finish(denoise(unet, scheduler, draw(single, (3, 16, 16)), STEPS, generators=single))
    assert torch.allclose(batch[1], one[0], atol=1e-4)
    assert not torch.allclose(batch[0], batch[1], atol=1e-1)


def test_channels_last_is_the_same_up_to_rounding():
    unet, noise, formats = build_unet(), torch.randn(2, 3, 16, 16), []
    unet.conv_in.register_forward_hook(
        lambda module, args, output: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    plain = finish(denoise(unet, sampling_scheduler(), noise, STEPS))
    last = finish(denoise(unet, sampling_scheduler(), noise.to(memory_format=torch.channels_last), STEPS))
    assert torch.allclose(plain, last, atol=1e-4)
    assert formats == [False] * STEPS + [True] * STEPS


def test_a_scheduler_that_does_not_fit_is_refused():
    scheduler = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="this U-Net predicts no variance"):
        next(denoise(build_unet(), scheduler, torch.randn(1, 3, 16, 16), STEPS))


def test_predicted_images_of_pure_signal():
    scheduler = sampling_scheduler("epsilon")
    images, noise = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    noisy = scheduler.alphas_cumprod[300] ** 0.5 * images + (1 - scheduler.alphas_cumprod[300]) ** 0.5 * noise
    assert torch.allclose(predicted_images(scheduler, noisy, noise, torch.tensor(300)), images, atol=1e-5)


@pytest.mark.parametrize("kind", [DDPMScheduler, DPMSolverMultistepScheduler])
def test_static_thresholding_is_the_librarys_without_its_quantile(monkeypatch, kind):
    unet, scheduler = build_unet(), kind.from_config(sampling_scheduler().config, variance_type="fixed_small")
    noise = 3 * draw(generators(0, 1), (3, 16, 16))

    def run():
        return list(denoise(unet, scheduler, noise, STEPS, thresholding="static", generators=generators(0, 1)))

    monkeypatch.setattr(denoising, "STATIC", None)  # which no scheduler has
    theirs = run()
    monkeypatch.undo()
    monkeypatch.setattr(torch, "quantile", None)
    for one, other in zip(run(), theirs, strict=True):
        assert torch.equal(one.sample, other.sample) and torch.equal(one.predicted, one.predicted.clamp(-1, 1))
    assert (predicted_images(scheduler, noise, torch.ones_like(noise), torch.tensor(500)).abs() > 1).any()
