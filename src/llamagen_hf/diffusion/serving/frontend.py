"""What pixel diffusion does around its engine: prompts become states, and predicted pixels are images already."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from pydantic import BaseModel, Field

from ...conditioning.text import PromptLoss
from ...serving.frontend import Frontend, ImageRequest, TokenCounts
from ..denoising import skip_noise
from ..inputs import DiffusionInputs
from ..pipeline import PixelDiffusionPipeline
from .batch import DiffusionBatch, DiffusionRequest


class SamplingFields(BaseModel):
    """The sampling settings of pixel diffusion, as fields of a request."""

    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Steps from noise to image.")
    guidance_scale: float | None = Field(
        None, ge=0, le=1000, allow_inf_nan=False, description="Strength of guidance, 1 for none."
    )


class FrontendPipeline(PixelDiffusionPipeline):
    """A pipeline whose U-Net has a configuration but no weights, which the engine has."""

    frontend_device = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        return self.frontend_device  # the U-Net is on the meta device

    @classmethod
    def _missing_settings(cls, folder: Path) -> dict:
        return PixelDiffusionPipeline._missing_settings(folder)


class DiffusionFrontend(Frontend):
    """The text encoder of pixel diffusion, and its settings.

    Args:
        pipe ([`FrontendPipeline`]): The pipeline.
        folder (`str`): Its folder, for the engine to load.
    """

    sampling_fields = SamplingFields
    edit_fields = None

    def __init__(self, pipe: FrontendPipeline, folder: str):
        super().__init__(pipe)
        if pipe.upsamples or not pipe.reads_text:
            does = "enlarges images" if pipe.upsamples else "draws from noise alone"
            raise ValueError(f"This checkpoint {does}, so it can't be served; expected one that draws from prompts.")
        self.folder, self.facts = folder, pipe.facts

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | None, device: str, dtype: torch.dtype, quantization: str | None = None
    ) -> "DiffusionFrontend":
        """Load a checkpoint, but for the U-Net's weights.

        Args:
            checkpoint (`str`, *optional*): As for [`PixelDiffusionPipeline.from_pretrained`].
            device (`str`): Device of the models.
            dtype (`torch.dtype`): Type of their weights.
            quantization (`str`, *optional*): None, since a U-Net's time goes into convolutions.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If it draws from no condition, or is to be quantized.
        """
        if quantization is not None:
            raise ValueError("Only generators of codes are quantized here, but this checkpoint draws pixels.")
        folder = FrontendPipeline.find_checkpoint(checkpoint)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        pipe = FrontendPipeline.from_pretrained(checkpoint, unet=unet.to(dtype).eval(), dtype=dtype)
        pipe.frontend_device = torch.device(device)
        if pipe.text_encoder is not None:
            pipe.text_encoder.to(device)
        return cls(pipe, str(folder))

    def capacity(self, slots: int) -> int:
        """Roughly how many images the engine draws at once."""
        return 1 if self.pipe.device.type == "cpu" else max(1, slots // 2)

    def batch_loader(
        self, slots: int, compile: bool = False, threads: int | None = None, decoding_window: int = 1
    ) -> partial[DiffusionBatch]:
        """What a [`~llamagen_hf.serving.local_engine.LocalEngine`] loads, see [`DiffusionBatch.from_pretrained`].

        Raises:
            ValueError: If it is to be compiled, which U-Nets are not here, or to draw codes.
        """
        if decoding_window != 1:
            raise ValueError("`--decoding-window` is for generators of codes, but this checkpoint draws pixels.")
        if compile:
            raise ValueError("`--compile` compiles generators of LlamaGen, but this checkpoint draws pixels.")
        device, dtype = str(self.pipe.device), str(self.pipe.unet.dtype).removeprefix("torch.")
        return partial(DiffusionBatch.from_pretrained, self.folder, slots, device, dtype, threads)

    def resolve_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        return settings | self.pipe.sampling_settings(**self._own(settings))

    def _own(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {name: settings.get(name) for name in SamplingFields.model_fields}

    def find_loss(self, prompt: str) -> PromptLoss | None:
        return None if self.pipe.text_encoder is None else self.pipe.find_loss(prompt)

    def encode_prompts(self, prompts: list[str]) -> list[tuple[torch.Tensor, torch.LongTensor] | None]:
        """States `(condition_length, condition_dim)` and mask `(condition_length,)` of each prompt."""
        if self.pipe.text_encoder is None:
            return [None] * len(prompts)  # which `prepare` refuses
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: str) -> tuple[torch.Tensor, torch.LongTensor]:
        embeds, mask = self.pipe.encode_prompt(prompt)
        return embeds[0].cpu(), mask[0].cpu()

    @cached_property
    def _null_embeds(self) -> torch.Tensor:
        return self._encode("")[0]

    @torch.no_grad()
    def prepare(
        self, request: ImageRequest, states: tuple[torch.Tensor, torch.LongTensor] | None
    ) -> tuple[DiffusionRequest, dict]:
        reads_prompts = self.pipe.text_encoder is not None
        condition = {"prompt": request.prompt}
        if not reads_prompts and states is not None:
            condition = {"prompt_embeds": states[0][None]}
        inputs = DiffusionInputs(**condition, **self._own(request.settings))
        settings = self.pipe.check(inputs)
        (parameters,) = self.pipe.describe(inputs, settings, [torch.Generator().manual_seed(0)])
        null = self._null_embeds if reads_prompts and settings["guidance_scale"] != 1 else None
        prepared = DiffusionRequest(
            seed=0,
            prompt_embeds=states[0],
            prompt_attention_mask=states[1],
            negative_prompt_embeds=null,
            shows_previews=request.partial_images > 0,
            **settings,
        )
        return prepared, parameters

    def count_tokens(self, request: DiffusionRequest) -> TokenCounts:
        """Words of the prompt, no codes, and the steps."""
        return TokenCounts(int(request.prompt_attention_mask.sum()), 0, request.num_inference_steps)

    def generator_after(self, request: DiffusionRequest) -> torch.Generator:
        generator, side = torch.Generator().manual_seed(request.seed), self.pipe.image_size
        noise = torch.randn(1, 3, side, side, generator=generator)
        skip_noise(self.pipe.scheduler, noise, request.num_inference_steps, [generator])
        return generator

    def decode(self, items: list[tuple[DiffusionRequest, list[Image.Image | None]]]) -> list[Image.Image]:
        return [latents[-1] for _, latents in items]
