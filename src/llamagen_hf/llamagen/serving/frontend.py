"""What LlamaGen does around its engine: prompts, classes and uploads become prefixes, codes become images."""

import io
from functools import partial
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import BaseModel, Field

from ...arguments import FieldError
from ...conditioning.text import PromptLoss
from ...images.reading import UPLOAD_MEGAPIXELS, read_image
from ...loading.quantization import check_quantization, quantize_components
from ...serving.frontend import Frontend, ImageRequest, TokenCounts
from ..configuration import LlamaGenConfig
from ..inputs import GenerationInputs
from ..modeling import LlamaGenForConditionalGeneration
from ..noise import draw_noise_keys
from ..pipeline import AutoregressiveImagePipeline
from .batch import ContinuousBatch, GenerationRequest
from .mask import rows_to_keep


class SamplingFields(BaseModel):
    """LlamaGen's sampling settings, as fields of a request."""

    guidance_scale: float | None = Field(
        None, ge=0, le=1000, allow_inf_nan=False, description="Strength of guidance, 1 for none."
    )
    guidance_interval: int | None = Field(
        -1, ge=-1, le=2**31, description="Guide the first n + 2 codes only; -1 for all."
    )
    temperature: float | None = Field(
        None, ge=0, le=1000, allow_inf_nan=False, description="0 for the likeliest codes."
    )
    top_k: int | None = Field(None, ge=0, le=2**31, description="Codes to draw from, 0 for all.")
    top_p: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Probability to draw from, 1 for all."
    )


class FrontendPipeline(AutoregressiveImagePipeline):
    """A pipeline whose transformer has a configuration but no weights, which the engine has."""

    @property
    def device(self) -> torch.device:
        return self.vq_model.device  # the transformer is on the meta device

    def _warn_of_losses(self, prompts: list[str]) -> None:
        """Nothing: the server warns its clients instead, and prompts stay out of its log."""


class LlamaGenFrontend(Frontend):
    """LlamaGen's image tokenizer and text encoder.

    Args:
        pipe ([`FrontendPipeline`]): The pipeline.
        generator_folder (`str`): Folder of the generator, for the engine to load.
        quantization (`str`, *optional*): Mode of [`~llamagen_hf.loading.quantization.quantize_components`], for the
            engine too.
    """

    sampling_fields = SamplingFields

    def __init__(self, pipe: FrontendPipeline, generator_folder: str, quantization: str | None = None):
        super().__init__(pipe)
        self.generator_folder, self.quantization, self.facts = generator_folder, quantization, pipe.facts
        grid_size = pipe.generator_config.grid_size
        rows = f"Rows of codes to keep, out of {grid_size}. Default: what `mask` keeps, or else the upper half."
        keep_rows = Annotated[int | None, Field(ge=0, lt=grid_size, description=rows)]
        self.edit_fields = {"keep_rows": (keep_rows, None)}

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | None, device: str, dtype: torch.dtype, quantization: str | None = None
    ) -> "LlamaGenFrontend":
        """Load a checkpoint, but for the generator's weights.

        Args:
            checkpoint (`str`, *optional*): As for [`AutoregressiveImagePipeline.from_pretrained`].
            device (`str`): Device of the models.
            dtype (`torch.dtype`): Type of their weights.
            quantization (`str`, *optional*): How the engine quantizes the generator.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If the generator's quantization does not run here.
        """
        folder = FrontendPipeline.find_checkpoint(checkpoint)
        config = None if quantization is None else quantize_components({"transformer": quantization})
        check_quantization(folder, {"quantization_config": config, "dtype": dtype})
        with torch.device("meta"):
            transformer = LlamaGenForConditionalGeneration(LlamaGenConfig.from_pretrained(folder / "transformer"))
        if config is not None:
            transformer.config.quantization_config = config.quant_mapping["transformer"]
        pipe = FrontendPipeline.from_pretrained(checkpoint, transformer=transformer.to(dtype).eval(), dtype=dtype)
        for component in (pipe.vq_model, pipe.text_encoder):
            if component is not None:
                component.to(device)
        return cls(pipe, str(folder / "transformer"), quantization)

    def capacity(self, slots: int) -> int:
        """Roughly how many images the engine generates at once."""
        return max(1, slots // 2)

    def batch_loader(
        self, slots: int, compile: bool = False, threads: int | None = None, decoding_window: int = 1
    ) -> partial[ContinuousBatch]:
        """What a [`~llamagen_hf.serving.local_engine.LocalEngine`] loads, see [`ContinuousBatch.from_pretrained`]."""
        device, dtype = str(self.pipe.device), str(self.pipe.transformer.dtype).removeprefix("torch.")
        return partial(
            ContinuousBatch.from_pretrained,
            self.generator_folder,
            slots,
            device,
            dtype,
            compile,
            threads,
            decoding_window,
            self.quantization,
        )

    def resolve_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        sampling = {name: settings.get(name) for name in SamplingFields.model_fields}
        return settings | self.pipe.sampling_settings(**sampling)

    def find_loss(self, prompt: str) -> PromptLoss | None:
        return None if self.pipe.text_encoder is None else self.pipe.find_loss(prompt)

    def encode_prompts(self, prompts: list[str]) -> list[tuple[torch.Tensor, torch.LongTensor] | None]:
        """States `(condition_length, condition_dim)` and mask `(condition_length,)` of each prompt."""
        if self.pipe.text_encoder is None:
            return [None] * len(prompts)  # which `prepare` refuses
        unique = list(dict.fromkeys(prompts))
        # On a CPU a batch saves little, and its size changes the last bits of every row.
        alone = self.pipe.device.type == "cpu"
        encoded = {}
        for group in [[prompt] for prompt in unique] if alone else [unique]:
            embeds, mask = self.pipe.encode_prompt(group)
            embeds, mask = embeds.to(self.pipe.transformer.dtype).cpu(), mask.cpu()
            for index, name in enumerate(group):  # with memory of its own, since requests are pickled
                encoded[name] = embeds[index].clone(), mask[index].clone()
        return [encoded[prompt] for prompt in prompts]

    @torch.no_grad()
    def prepare(
        self, request: ImageRequest, states: tuple[torch.Tensor, torch.LongTensor] | None
    ) -> tuple[GenerationRequest, dict]:
        start = {} if request.upload is None else self._read_upload(request)
        settings = {name: request.settings.get(name) for name in SamplingFields.model_fields}
        inputs = GenerationInputs(prompt=request.prompt, class_labels=request.class_label, **start, **settings)
        prepared = inputs.prepare(
            self.pipe.generator_config,
            image_size=self.pipe.image_size,
            device=torch.device("cpu"),
            dtype=self.pipe.transformer.dtype,
            sampling_defaults=self.pipe.sampling_settings(),
            encode_prompt=None if states is None else lambda _: [part[None] for part in states],
            encode_image=self.pipe.encode_image,
        )
        (parameters,) = prepared.describe([torch.Generator().manual_seed(0)], self.facts)
        tensors = {name: rows[0] for name, rows in prepared.tensors.items()}
        kept = tensors.pop("prefix_codes").tolist() if "prefix_codes" in tensors else []
        if "class_ids" in tensors:
            tensors = {"class_id": tensors["class_ids"].item()}
        return GenerationRequest(seed=0, prefix_codes=kept, **tensors, **prepared.params.sampling), parameters

    def _read_upload(self, request: ImageRequest) -> dict[str, Any]:
        """The `image` of a request and its `keep_rows`."""
        keep_rows = request.settings.get("keep_rows")
        if request.mask is not None and keep_rows is not None:
            raise FieldError("mask", "Pass `mask` or `keep_rows`, not both: each says how much of `image` to keep.")
        try:
            image = read_image(io.BytesIO(request.upload), max_megapixels=UPLOAD_MEGAPIXELS)
        except ValueError as error:
            raise FieldError("image", str(error)) from error
        if keep_rows is None:
            grid_size = self.pipe.generator_config.grid_size
            keep_rows = rows_to_keep(request.mask, request.upload, image.size, grid_size)
        return {"image": image, "keep_rows": keep_rows}

    def count_tokens(self, request: GenerationRequest) -> TokenCounts:
        """Positions of the generator: words of the prompt (1 for a class), codes kept and codes drawn."""
        words = 1 if request.class_id is not None else int(request.prompt_attention_mask.sum())
        kept = len(request.prefix_codes)
        return TokenCounts(words, kept, self.pipe.generator_config.num_codes - kept)

    def generator_after(self, request: GenerationRequest) -> torch.Generator:
        generator = torch.Generator().manual_seed(request.seed)
        draw_noise_keys(1, generator, torch.device("cpu"))
        return generator

    def decode(self, items: list[tuple[GenerationRequest, list[int]]]) -> list[Image.Image]:
        config = self.pipe.generator_config
        sequences = [request.prefix_codes + latents for request, latents in items]
        alone = self.pipe.device.type == "cpu"  # as for prompts
        groups: dict[tuple, list[int]] = {}
        for index, codes in enumerate(sequences):
            groups.setdefault((len(codes), index if alone else 0), []).append(index)
        decoded = {}
        for (length, _), members in groups.items():
            codes = torch.tensor([sequences[i] for i in members], device=self.pipe.device)
            if length == config.num_codes:
                images = self.pipe.decode_codes(codes.unflatten(1, (config.grid_size, config.grid_size)))
            else:
                images = self.pipe.preview(codes)
            decoded |= zip(members, images, strict=True)
        return [decoded[index] for index in range(len(items))]
