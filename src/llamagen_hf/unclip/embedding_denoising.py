"""The diffusion prior's loop: from noise to image embeddings, one step of a scheduler after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

import torch
from diffusers import DDPMScheduler, PriorTransformer, SchedulerMixin

from .clip_encoders import TextCondition


def prior_scheduler() -> DDPMScheduler:
    """The noise schedule of a prior, in training and sampling: the cosine schedule, with embeddings predicted.

    Its steps are those of [`~diffusers.UnCLIPScheduler`], which diffusers advises against. Another one with the same
    noise schedule takes fewer steps, such as `DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        variance_type="fixed_small_log",
        timestep_spacing="linspace",
        # Standardised embeddings: what lies beyond ten deviations is an error.
        clip_sample=True,
        clip_sample_range=10.0,
    )


@dataclass
class EmbeddingStep:
    """A step of [`denoise_embeddings`]. What is changed in it holds for the steps that follow.

    Args:
        index (`int`): Its place, from 0.
        num_steps (`int`): How many steps there are.
        timestep (`torch.Tensor`): Its place in the noise schedule.
        sample (`torch.Tensor` of shape `(batch, dim)`): What is to be denoised next; after the last step the
            standardised embeddings.
        guidance_scale (`float`): Strength of classifier-free guidance.
    """

    index: int
    num_steps: int
    timestep: torch.Tensor
    sample: torch.Tensor
    guidance_scale: float


@torch.no_grad()
def denoise_embeddings(
    prior: PriorTransformer,
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    num_inference_steps: int,
    *,
    text: TextCondition,
    null_text: TextCondition | None = None,
    guidance_scale: float = 1.0,
    generators: list[torch.Generator] | None = None,
) -> Iterator[EmbeddingStep]:
    """Turn noise into standardised image embeddings (arXiv 2204.06125, section 2.2). Nothing is changed.

    Args:
        prior ([`~diffusers.PriorTransformer`]): Predicts embeddings from noisy ones.
        scheduler ([`~diffusers.SchedulerMixin`]): Any with the noise schedule of the training.
        noise (`torch.Tensor` of shape `(batch, dim)`): Normal noise, float32.
        num_inference_steps (`int`): How many steps the scheduler spreads over its schedule.
        text ([`~llamagen_hf.unclip.clip_encoders.TextCondition`]): The captions, one for each row.
        null_text ([`~llamagen_hf.unclip.clip_encoders.TextCondition`], *optional*): What guidance leads away from.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Strength of classifier-free guidance (arXiv 2207.12598). 1 turns it off and halves the work.
        generators (`list[torch.Generator]`, *optional*): One for each row, for schedulers that add noise.

    Yields:
        [`EmbeddingStep`]: Each step, after it was taken.
    """
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    options = {"generator": generators} if "generator" in signature(scheduler.step).parameters else {}
    both = text
    if null_text is not None:
        pairs = zip(null_text.tensors, text.tensors, strict=True)
        both = TextCondition(*(torch.cat(pair) for pair in pairs))  # the unconditional half comes first
    sample, steps = noise * scheduler.init_noise_sigma, scheduler.timesteps
    for index, timestep in enumerate(steps):
        with torch.autocast(noise.device.type, enabled=False):
            noisy = scheduler.scale_model_input(sample, timestep)
            if null_text is not None and guidance_scale != 1:
                null, output = predict_embeddings(prior, torch.cat([noisy, noisy]), timestep, both).chunk(2)
                output = null + guidance_scale * (output - null)
            else:
                output = predict_embeddings(prior, noisy, timestep, text)
            sample = scheduler.step(output, timestep, sample, **options, return_dict=False)[0]
        step = EmbeddingStep(index, len(steps), timestep, sample, guidance_scale)
        yield step
        sample, guidance_scale = step.sample, step.guidance_scale


def predict_embeddings(
    prior: PriorTransformer, noisy: torch.Tensor, timesteps: torch.Tensor, text: TextCondition
) -> torch.Tensor:
    """The standardised embeddings `(batch, dim)` that a prior sees in noisy ones, in float32."""
    return prior(
        noisy.to(prior.dtype),
        timestep=timesteps,
        proj_embedding=text.embeds.to(prior.dtype),
        encoder_hidden_states=text.states.to(prior.dtype),
        attention_mask=text.mask.bool(),
        return_dict=False,
    )[0].float()
