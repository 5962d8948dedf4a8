"""What a cascade does around the engine of its base: finished images go through the upsampler."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, Field, create_model

from ...conditioning.text import PromptLoss
from ...diffusion.inputs import DiffusionInputs
from ...diffusion.pipeline import PixelDiffusionPipeline
from ...local_paths import public_name
from ...provenance import describe
from ...reproducibility import next_generators
from ...serving.engine import EngineRequest
from ...serving.frontend import Frontend, ImageRequest, TokenCounts
from ..cascade import CascadePipeline, joined_settings, split_settings
from ..cascade_output import with_upsampler


class UpsamplingFields(BaseModel):
    """The upsampler's settings, as fields of a request."""

    aug_level: float | None = Field(
        None, ge=0, le=1, description="Noise added to the small image before it is enlarged, 0 to 1."
    )
    upsampler_num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Steps of the upsampler.")


class GuidedUpsamplingFields(UpsamplingFields):
    """The settings of an upsampler that reads text."""

    upsampler_guidance_scale: float | None = Field(
        None, ge=0, le=1000, allow_inf_nan=False, description="Strength of the upsampler's guidance, 1 for none."
    )


@dataclass(frozen=True)
class Enlargement:
    """How an image is enlarged once it is drawn: a prompt, and settings under the names of the upsampler.

    `base` is what the frontend of the base keeps of the request.
    """

    prompt: str | None
    settings: dict[str, Any]
    base: Any = None


class CascadeFrontend(Frontend):
    """An upsampler behind the frontend of a base. An engine that generates for the base needs nothing else.

    Args:
        base ([`~llamagen_hf.serving.frontend.Frontend`]): Prepares requests, and decodes small images.
        upsampler ([`PixelDiffusionPipeline`]): Enlarges them, on its own device.
        checkpoint (`str`, *optional*): What both were loaded from; by default that of the base.

    Raises:
        ValueError: If they do not belong together.
    """

    def __init__(self, base: Frontend, upsampler: PixelDiffusionPipeline, checkpoint: str | None = None):
        super().__init__(CascadePipeline(base.pipe, upsampler))
        self.base, self.upsampler = base, upsampler
        upsampler.set_progress_bar_config(disable=True)
        self.facts = base.facts | ({} if checkpoint is None else {"checkpoint": checkpoint})
        own = GuidedUpsamplingFields if upsampler.reads_text else UpsamplingFields
        self.sampling_fields = create_model("CascadeSamplingFields", __base__=(base.sampling_fields, own))
        self.edit_fields = base.edit_fields
        # What every request would be refused for.
        upsampler.check(DiffusionInputs(prompt=self._read(""), image=Image.new("RGB", (1, 1))))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those of the base, whose images are not enlarged, and that of the upsampler."""
        return (*self.base.sizes, self.pipe.image_size)

    def resolve_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        base, upsampler = split_settings(settings)
        return joined_settings(self.base.resolve_settings(base), self.upsampler.sampling_settings(**upsampler))

    def find_loss(self, prompt: str) -> PromptLoss | None:
        return self.base.find_loss(prompt)

    def encode_prompts(self, prompts: list[str]) -> list[Any]:
        return self.base.encode_prompts(prompts)

    def prepare(self, request: ImageRequest, states: Any) -> tuple[EngineRequest, dict]:
        prepared, parameters = self.base.prepare(request, states)
        if request.side is not None and request.side <= max(self.base.sizes):
            return prepared, parameters
        known = self.sampling_fields.model_fields.keys()
        given = {name: value for name, value in request.settings.items() if name in known}
        settings = self.upsampler.sampling_settings(**split_settings(given)[1])
        enlargement = Enlargement(self._read(request.prompt), settings, prepared.finishing)
        return replace(prepared, finishing=enlargement), parameters

    def add_conditions(self, requests: list[EngineRequest]) -> list[EngineRequest]:
        conditioned, smalls = [], self.base.add_conditions([small_of(request) for request in requests])
        for request, small in zip(requests, smalls, strict=True):
            if isinstance(enlargement := request.finishing, Enlargement):
                small = replace(small, finishing=replace(enlargement, base=small.finishing))
            conditioned.append(small)
        return conditioned

    def _read(self, prompt: str | None) -> str | None:
        """What the upsampler reads of a prompt."""
        return prompt if self.upsampler.reads_text and self.pipe.condition_kind == "text" else None

    def count_tokens(self, request: EngineRequest) -> TokenCounts:
        return self.base.count_tokens(small_of(request))

    def generator_after(self, request: EngineRequest) -> torch.Generator:
        return self.base.generator_after(small_of(request))

    def complete(self, request: EngineRequest, parameters: dict) -> dict:
        parameters = self.base.complete(small_of(request), parameters)
        if not isinstance(enlargement := request.finishing, Enlargement):
            return parameters
        facts = self.upsampler.facts
        if "checkpoint" in facts:  # clients can read it
            facts["checkpoint"] = public_name(facts["checkpoint"])
        condition = {} if enlargement.prompt is None else {"prompt": enlargement.prompt}
        (own,) = describe([condition], enlargement.settings, [self._noise(request)], facts)
        return with_upsampler(parameters, own)

    def _noise(self, request: EngineRequest) -> torch.Generator:
        """The upsampler's generator, as the cascade would have it for this seed."""
        return next_generators([self.generator_after(request)])[0]

    def decode(self, items: list[tuple[EngineRequest, list]]) -> list[Image.Image]:
        images = self.base.decode([(small_of(request), latents) for request, latents in items])
        side = self.pipe.image_size
        alone = self.upsampler.device.type == "cpu"  # a batch saves little there, and its size changes the last bits
        groups: dict[tuple, list[int]] = {}
        for index, (request, latents) in enumerate(items):
            if not isinstance(enlargement := request.finishing, Enlargement):
                continue
            if len(latents) < self.count_tokens(request).output:  # a preview
                images[index] = images[index].resize((side, side), Image.Resampling.BICUBIC)
            else:
                key = tuple(sorted(enlargement.settings.items())), enlargement.prompt is None, index if alone else 0
                groups.setdefault(key, []).append(index)
        for members in groups.values():
            requests = [items[index][0] for index in members]
            first = requests[0].finishing
            output = self.upsampler(
                prompt=None if first.prompt is None else [request.finishing.prompt for request in requests],
                image=[images[index] for index in members],
                generator=[self._noise(request) for request in requests],
                **first.settings,
            )
            for index, image in zip(members, output.images, strict=True):
                images[index] = image
        return images


def small_of(request: EngineRequest) -> EngineRequest:
    """A request as the frontend of the base made it."""
    enlargement = request.finishing
    return replace(request, finishing=enlargement.base) if isinstance(enlargement, Enlargement) else request
