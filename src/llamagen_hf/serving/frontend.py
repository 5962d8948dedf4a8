"""What a family does around its engine: it turns clients' requests into the engine's, and latents into images."""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import BaseModel

from ..conditioning.text import PromptLoss
from ..provenance import write_png
from .engine import EngineRequest


MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True)
class ImageRequest:
    """What a client asks for. The i-th image has `seed` + i, or a random seed if there is none.

    `settings` are the family's own fields, where `None` is the checkpoint's default. `upload` and `mask` are the files
    of an image to edit and of its mask, `variation_of` is that of an image to vary, in place of a prompt. `quality` is
    that of JPEG and WebP, from 0 to 100; `side` is in pixels, if the images are to be scaled. `field_names` is what
    the client calls arguments of the pipeline, where the names differ.
    """

    prompt: str | None = None
    class_label: int | str | None = None
    n: int = 1
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    upload: bytes | None = None
    mask: bytes | None = None
    variation_of: bytes | None = None
    output_format: str = "png"
    quality: int = 100
    side: int | None = None
    partial_images: int = 0
    timeout: float | None = None
    field_names: dict[str, str] = field(default_factory=dict)

    def write(self, image: Image.Image, parameters: dict) -> bytes:
        """The file of an image, as the client wants it. A PNG holds the parameters."""
        file = io.BytesIO()
        if self.side is not None:
            image = image.resize((self.side, self.side), Image.Resampling.LANCZOS)
        if self.output_format == "png":
            write_png(image, file, parameters)
        else:
            image.save(file, self.output_format, quality=self.quality)
        return file.getvalue()


class TokenCounts(NamedTuple):
    """Size of a request, as OpenAI counts it: words of the prompt, parts of the image kept, steps of the engine."""

    text: int
    image: int
    output: int


class Frontend(ABC):
    """The parts of a pipeline that work beside the engine. The service calls them in threads.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): The pipeline, which need not have the weights that the engine loads.

    Attributes:
        sampling_fields (`type[BaseModel]`): The family's own fields of all requests.
        edit_fields (`dict[str, tuple]`, *optional*):
            Further ones of edits: types and defaults for pydantic's `create_model`. `None` if it edits no images.
    """

    sampling_fields: type[BaseModel]
    edit_fields: dict[str, tuple] | None

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels of the images that it makes, in ascending order."""
        return (self.pipe.image_size,)

    @abstractmethod
    def resolve_settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The family's own fields, with the checkpoint's defaults in place of `None`."""

    @abstractmethod
    def find_loss(self, prompt: str) -> PromptLoss | None:
        """What the checkpoint does not read of a prompt; `None` if it reads all of it."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> list[Any]:
        """What [`prepare`] takes of each prompt."""

    @abstractmethod
    def prepare(self, request: ImageRequest, states: Any) -> tuple[EngineRequest, dict]:
        """Check a request, with its encoded prompt (`None` if it has none), and read its uploads.

        Returns:
            The request to the engine, and the parameters to store in the image, both with the seed 0.

        Raises:
            ValueError: If something does not fit; a [`~llamagen_hf.arguments.FieldError`] if that is a single field.
        """

    def add_conditions(self, requests: list[EngineRequest]) -> list[EngineRequest]:
        """The requests, whose seeds are known by now, with the conditions that depend on these.

        Raises:
            ValueError: If something does not fit. Of several requests each is then tried by itself.
        """
        return requests

    @abstractmethod
    def count_tokens(self, request: EngineRequest) -> TokenCounts:
        """Size of a request; `output` is the number of latents that the engine yields."""

    @abstractmethod
    def generator_after(self, request: EngineRequest) -> torch.Generator:
        """The generator of an image in the state in which the pipeline leaves it, for what follows."""

    def complete(self, request: EngineRequest, parameters: dict) -> dict:
        """The parameters of an image whose seed is known, with what else depends on it."""
        return parameters

    @abstractmethod
    def decode(self, items: list[tuple[EngineRequest, list]]) -> list[Image.Image]:
        """Decode images of requests and their latents so far: all of them, or the first ones for a preview."""
