"""From the arguments of a call to what the denoising loop starts from."""

from dataclasses import dataclass

import torch

from ..provenance import describe
from ..reproducibility import clone, image_generators, told_apart
from .inputs import DiffusionInputs, UNetTraits, check_settings
from .schedules import augment, check_scheduler
from .unet import condition_dim, learns_variance


@dataclass
class PreparedInputs:
    """What [`~llamagen_hf.diffusion.denoising.denoise`] starts from, a row for each image to draw.

    Args:
        inputs ([`DiffusionInputs`]): The arguments of the call.
        noise (`torch.Tensor` of shape `(rows, 3, height, width)`): The noise.
        condition (`dict[str, torch.Tensor]`): Text states, small images and what belongs to them.
        settings (`dict`): `num_inference_steps` and, where there is text, `guidance_scale`.
        generators (`list[torch.Generator]`): For noise on the way.
        names (`list[str | None]`): Prompts; `None` where there is none.
        parameters (`list[dict]`): What makes each image.
        group_size (`int`): How many rows, one after the other, are candidates for one image.
    """

    inputs: DiffusionInputs
    noise: torch.Tensor
    condition: dict[str, torch.Tensor]
    settings: dict
    generators: list[torch.Generator]
    names: list[str | None]
    parameters: list[dict]
    group_size: int


class PreparationMixin:
    """Prepares the calls of a pixel diffusion pipeline."""

    def check(self, inputs: DiffusionInputs) -> dict:
        """Check the arguments of a call, and return its settings, none of them `None`.

        Raises:
            ValueError: If an argument or the scheduler does not fit.
        """
        dim, length = condition_dim(self.unet), self.config.condition_length
        reads_prompts = self.text_encoder is not None and self.tokenizer is not None
        inputs.check(UNetTraits(self.image_size, self.upsamples, dim, length, reads_prompts))
        given = {name: getattr(inputs, name) for name in ("num_inference_steps", "aug_level")}
        given |= {"guidance_scale": inputs.guidance_scale} if self.reads_text else {}
        settings = self.sampling_settings(**given)
        check_settings(settings)
        check_scheduler(self.scheduler, learns_variance(self.unet), self._trained_scheduler)
        return settings

    def prepare(self, inputs: DiffusionInputs) -> PreparedInputs:
        """Check the arguments of a call, encode its prompts and images, and draw its noise.

        Raises:
            ValueError: If an argument or the scheduler does not fit.
        """
        settings = self.check(inputs)
        condition = self._encode_text(inputs, settings["guidance_scale"]) if self.reads_text else {}
        generators = image_generators(inputs.generator, inputs.num_images, inputs.num_candidates)
        parameters = self.describe(inputs, settings, generators)
        generators = told_apart(generators)
        noise = self._draw_noise(generators)
        group_size = inputs.num_candidates
        if self.upsamples:
            level = settings.pop("aug_level")
            levels = level if isinstance(level, list) else [level]
            small, aug_noise = self.encode_image(inputs.image), self._draw_noise(generators)
            # Row by row the levels of an image, with the same noise.
            count, group_size = len(levels), group_size * len(levels)
            generators = [clone(each) if index else each for each in generators for index in range(count)]
            noise, aug_noise = noise.repeat_interleave(count, 0), aug_noise.repeat_interleave(count, 0)
            aug_level = torch.tensor(levels * (len(noise) // count), dtype=torch.float32, device=noise.device)
            small = small.repeat_interleave(len(noise) // len(small), 0)
            condition |= {"small": augment(self.scheduler, small, aug_noise, aug_level), "aug_level": aug_level}
            parameters = [each | {"aug_level": level} for each in parameters for level in levels]
            if count > 1:
                for row, each in enumerate(parameters):
                    each |= {"batch_size": len(noise), "batch_index": row}
        rows = len(noise)
        for name in condition.keys() - {"small", "aug_level"}:
            condition[name] = condition[name].repeat_interleave(rows // len(condition[name]), 0)
        if noise.device.type == "cpu":
            noise = noise.to(memory_format=torch.channels_last)
        prompts = inputs.prompts or [None]
        names = [prompt for prompt in prompts for _ in range(rows // len(prompts))]
        return PreparedInputs(inputs, noise, condition, settings, generators, names, parameters, group_size)

    def _encode_text(self, inputs: DiffusionInputs, guidance_scale: float) -> dict[str, torch.Tensor]:
        """States and masks with and without the condition, a row or one for each condition."""
        embeds, mask = inputs.prompt_embeds, inputs.prompt_attention_mask
        if inputs.prompt is not None:
            embeds, mask = self.encode_prompt(inputs.prompts)
        null_embeds, null_mask = None, None
        if embeds is None or guidance_scale != 1:
            null_embeds, null_mask = self._encode_null(inputs)
        if embeds is None:  # an upsampler without a prompt
            embeds, mask, null_embeds = null_embeds, null_mask, None
        elif mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        states = {"states": (embeds, mask)}
        if null_embeds is not None:
            states["null_states"] = (null_embeds, null_mask)
        condition = {}
        for name, (embeds, mask) in states.items():
            mask = mask.to(self._execution_device, torch.long)
            embeds = embeds.to(self._execution_device, self.unet.dtype)
            if self.convention.masks_padding:
                embeds = embeds.masked_fill(mask[..., None] == 0, 0)  # the pooled text has no mask
                condition[name.replace("states", "mask")] = mask
            condition[name] = embeds
        return condition

    def _encode_null(self, inputs: DiffusionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """States and mask of what guidance leads away from."""
        if inputs.negative_prompt_embeds is not None:
            embeds = inputs.negative_prompt_embeds
            return embeds, embeds.any(-1)
        if self.text_encoder is not None and self.tokenizer is not None:
            return self.encode_prompt(inputs.negative_prompt or "")
        shape = (1, self.config.condition_length, condition_dim(self.unet))
        return torch.zeros(shape), torch.zeros(shape[:2])

    def _draw_noise(self, generators: list[torch.Generator]) -> torch.Tensor:
        """Normal noise `(rows, 3, height, width)` on the device of the U-Net, each row from its own generator."""
        # Always float32, since a seed gives other numbers in another dtype.
        shape, options = (3, self.image_size, self.image_size), {"dtype": torch.float32}
        rows = [torch.randn(shape, generator=each, device=each.device, **options) for each in generators]
        return torch.stack([row.to(self._execution_device) for row in rows])

    def describe(self, inputs: DiffusionInputs, settings: dict, generators: list[torch.Generator]) -> list[dict]:
        """The parameters of each image that is drawn from `generators`, see [`~llamagen_hf.provenance.describe`]."""
        count, conditions = len(generators), []
        for index in range(count):
            condition = {}
            for name in ("prompt", "negative_prompt"):
                texts = getattr(inputs, name)
                if texts is not None:
                    condition[name] = texts if isinstance(texts, str) else texts[index * len(texts) // count]
            conditions.append(condition)
        own = {name: True for name in ("prompt_embeds", "negative_prompt_embeds") if getattr(inputs, name) is not None}
        if inputs.guide is not None:
            name = getattr(inputs.guide, "__name__", type(inputs.guide).__name__)
            own["guide"] = getattr(inputs.guide, "facts", name)
        return describe(conditions, settings, generators, self.facts, [own] * count)
