"""What a prior does before the engine of its decoder: prompts and images become embeddings, which the engine reads."""

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field, create_model

from ...arguments import FieldError
from ...conditioning.text import PromptLoss
from ...diffusion.serving.batch import DiffusionRequest
from ...diffusion.serving.frontend import DiffusionFrontend
from ...images.reading import UPLOAD_MEGAPIXELS, read_image
from ...llamagen.serving.batch import GenerationRequest
from ...llamagen.serving.frontend import LlamaGenFrontend
from ...loading.parts import load_part
from ...reproducibility import clone
from ...serving.frontend import Frontend, ImageRequest, TokenCounts
from ..decoder_output import Embeddings
from ..decoder_pipeline import PRIOR_PREFIX, PriorDecoderPipeline
from ..prior import EmbeddingPriorPipeline


# Who prepares and decodes for a decoder, by its class.
DECODERS = {"AutoregressiveImagePipeline": LlamaGenFrontend, "PixelDiffusionPipeline": DiffusionFrontend}
DecoderRequest = GenerationRequest | DiffusionRequest

MAX_CANDIDATES = 64
# The settings of priors of both kinds, as fields of a request.
PRIOR_FIELDS = {
    "num_inference_steps": (int | None, Field(None, ge=1, le=1000, description="Steps of the prior.")),
    "guidance_scale": (
        float | None,
        Field(None, ge=0, le=1000, allow_inf_nan=False, description="Strength of the prior's guidance, 1 for none."),
    ),
    "temperature": (
        float | None,
        Field(None, ge=0, le=1000, allow_inf_nan=False, description="The prior's; 0 for the likeliest codes."),
    ),
    "top_k": (int | None, Field(None, ge=0, le=2**31, description="Codes of the prior to draw from, 0 for all.")),
    "top_p": (
        float | None,
        Field(None, ge=0, le=1, allow_inf_nan=False, description="Probability to draw the prior's codes from."),
    ),
    "num_candidates": (
        int | None,
        Field(None, ge=1, le=MAX_CANDIDATES, description="Embeddings to draw, of which the best is decoded."),
    ),
}
TRUNCATE = (bool | None, Field(False, description="Cut a prompt that is too long for CLIP, instead of refusing it."))


@dataclass(frozen=True)
class Source:
    """What the embedding of an image is made from and, once its seed is known, the embedding.

    Args:
        prompt (`str`, *optional*): A prompt, from which the prior draws it.
        image (`PIL.Image.Image`, *optional*): An image to vary, which CLIP encodes.
        settings (`dict`): Those of the prior, as the pipeline's arguments.
        found ([`~llamagen_hf.unclip.decoder_output.Embeddings`], *optional*): The embedding, as the only row.
        generator (`torch.Generator`, *optional*): The image's generator after that.
    """

    prompt: str | None = None
    image: Image.Image | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    found: Embeddings | None = None
    generator: torch.Generator | None = None


class PriorDecoderFrontend(Frontend):
    """A prior before the frontend of its decoder. An engine that generates for the decoder needs nothing else.

    Args:
        prior ([`EmbeddingPriorPipeline`]): Draws and encodes embeddings, on its own device.
        decoder ([`LlamaGenFrontend`] or [`DiffusionFrontend`]): Prepares requests, and decodes images.
        checkpoint (`str`, *optional*): What both were loaded from; by default that of the decoder.

    Raises:
        ValueError: If they do not belong together.
    """

    def __init__(
        self,
        prior: EmbeddingPriorPipeline,
        decoder: LlamaGenFrontend | DiffusionFrontend,
        checkpoint: str | None = None,
    ):
        super().__init__(PriorDecoderPipeline(prior, decoder.pipe))
        self.decoder = decoder
        prior.set_progress_bar_config(disable=True)
        self.facts = decoder.facts | ({} if checkpoint is None else {"checkpoint": checkpoint})
        own = {PRIOR_PREFIX + name: PRIOR_FIELDS[name] for name in prior.sampling_settings()}
        self.prior_fields = [*own, "truncate_prompt"]
        self.sampling_fields = create_model(
            "PriorDecoderSamplingFields", __base__=decoder.sampling_fields, **own, truncate_prompt=TRUNCATE
        )
        self.edit_fields = decoder.edit_fields

    @classmethod
    def from_pretrained(
        cls, checkpoint: str, device: str, dtype: torch.dtype, quantization: str | None = None
    ) -> "PriorDecoderFrontend":
        """Load a checkpoint, but for the decoder's generator.

        Args:
            checkpoint (`str`): As for [`PriorDecoderPipeline.from_pretrained`].
            device (`str`): Device of the models.
            dtype (`torch.dtype`): Type of their weights.
            quantization (`str`, *optional*): How the engine quantizes the generator.

        Raises:
            OSError: If there is no such checkpoint.
            ValueError: If its parts do not belong together, or if the generator's quantization does not run here.
        """
        folder = PriorDecoderPipeline.find_checkpoint(checkpoint)
        name = PriorDecoderPipeline.load_config(folder / "decoder")["_class_name"]
        decoder = DECODERS[name].from_pretrained(str(folder / "decoder"), device, dtype, quantization)
        return cls(load_part(Path(folder, "prior"), dtype=dtype).to(device), decoder, checkpoint)

    def resolve_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        names = self.sampling_fields.model_fields.keys() - {"truncate_prompt"}
        return settings | self.pipe.sampling_settings(**{name: settings.get(name) for name in names})

    def find_loss(self, prompt: str) -> PromptLoss | None:
        return self.pipe.find_loss(prompt)

    def encode_prompts(self, prompts: list[str]) -> list[None]:
        """Nothing: what a prior draws of a prompt depends on the seed."""
        return [None] * len(prompts)

    def prepare(self, request: ImageRequest, states: None) -> tuple[DecoderRequest, dict]:
        given = {name: request.settings.get(name) for name in self.prior_fields}
        given = {name: value for name, value in given.items() if value is not None}
        image = None
        if request.variation_of is not None:
            try:
                image = read_image(io.BytesIO(request.variation_of), max_megapixels=UPLOAD_MEGAPIXELS)
            except ValueError as error:
                raise FieldError("image", str(error)) from error
        placeholder = torch.zeros(1, self.pipe.prior.embedding_dim), torch.ones(1, dtype=torch.long)
        prepared, parameters = self.decoder.prepare(replace(request, prompt=""), placeholder)
        parameters = {name: value for name, value in parameters.items() if name != "prompt"}
        return replace(prepared, finishing=Source(request.prompt, image, given)), parameters

    def add_conditions(self, requests: list[DecoderRequest]) -> list[DecoderRequest]:
        """Draw the embeddings of prompts, and encode images, once each."""
        # On a CPU a batch saves little, and its size changes the last bits of every row in it.
        alone = self.pipe.device.type == "cpu"
        images = {id(request.finishing.image): request.finishing.image for request in requests}
        images = {key: image for key, image in images.items() if image is not None}
        batches = [[key] for key in images] if alone else [list(images)] if images else []
        embeds = {}
        for keys in batches:
            embeds |= zip(keys, self.pipe.encode_image([images[key] for key in keys]), strict=True)

        groups: dict[tuple, list[int]] = {}
        for index, request in enumerate(requests):
            source = request.finishing
            settings = tuple(sorted(source.settings.items()))
            groups.setdefault((id(source.image), settings, index if alone else 0), []).append(index)
        conditioned = {}
        for (key, *_), members in groups.items():
            generators = [torch.Generator().manual_seed(requests[index].seed) for index in members]
            if key in embeds:
                condition = {"image_embeds": embeds[key].expand(len(members), -1)}
            else:
                condition = {"prompt": [requests[index].finishing.prompt for index in members]}
            settings = requests[members[0]].finishing.settings
            found, _ = self.pipe.prepare(**condition, generator=generators, **settings)
            for row, (index, generator) in enumerate(zip(members, generators, strict=True)):
                conditioned[index] = self._conditioned(requests[index], found.row(row), generator)
        return [conditioned[index] for index in range(len(requests))]

    def _conditioned(self, request: DecoderRequest, found: Embeddings, generator: torch.Generator) -> DecoderRequest:
        """A request with its embedding, and with the seed that the decoder has after the prior."""
        return replace(
            request,
            seed=found.generators[0].initial_seed(),
            prompt_embeds=found.embeds.to(request.prompt_embeds),
            finishing=replace(request.finishing, found=found, generator=generator),
        )

    def count_tokens(self, request: DecoderRequest) -> TokenCounts:
        """Positions of the decoder: one of an embedding, of text or of an image; codes kept; codes or steps drawn."""
        text, kept, drawn = self.decoder.count_tokens(request)
        return TokenCounts(text, kept, drawn) if request.finishing.image is None else TokenCounts(0, text, drawn)

    def generator_after(self, request: DecoderRequest) -> torch.Generator:
        source = request.finishing
        # Of an image to vary there is no prior that draws before the decoder does.
        return self.decoder.generator_after(request) if source.image is not None else clone(source.generator)

    def complete(self, request: DecoderRequest, parameters: dict) -> dict:
        return request.finishing.found.joined(0, parameters | {"seed": request.seed})

    def decode(self, items: list[tuple[DecoderRequest, list]]) -> list[Image.Image]:
        return self.decoder.decode(items)
