"""What a family does around its engine: it turns clients' requests into the engine's, and latents into images."""

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import BaseModel

from ..conditioning.text import PromptLoss
from ..provenance import write_png
from .engine import EngineRequest


MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True)
class ImageRequest:
    """What a client asks for.

    Args:
        prompt (`str`, *optional*): The prompt.
        class_label (`int` or `str`, *optional*): Id or name of the class.
        n (`int`, *optional*, defaults to 1): Number of images.
        seed (`int`, *optional*): Seed of the first image; the i-th one has `seed + i`. Random by default.
        settings (`dict`, *optional*): The family's own fields; `None` is the checkpoint's default.
        upload (`bytes`, *optional*): The file of an image to edit.
        mask (`bytes`, *optional*): The file of a mask for it.
        output_format (`str`, *optional*, defaults to `"png"`): "png", "jpeg" or "webp".
        quality (`int`, *optional*, defaults to 100): Of JPEG and WebP, from 0 to 100.
        side (`int`, *optional*): Side in pixels to scale images to.
        partial_images (`int`, *optional*, defaults to 0): Previews of each image.
        timeout (`float`, *optional*): Seconds after which to give up.
        field_names (`dict[str, str]`, *optional*):
            What the client calls arguments of the pipeline, where the names differ.
    """

    prompt: str | None = None
    class_label: int | str | None = None
    n: int = 1
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    upload: bytes | None = None
    mask: bytes | None = None
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
        pipe ([`~diffusers.DiffusionPipeline`]):
            A pipeline of this package; it need not have the weights that the engine loads.

    Attributes:
        sampling_fields (`type[BaseModel]`): Fields of all requests that are the family's own.
        edit_fields (`dict[str, tuple]`):
            Further ones of edits, as type and default for [`~pydantic.create_model`].
    """

    sampling_fields: type[BaseModel]
    edit_fields: dict[str, tuple]

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

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
        """Check a request and read its uploads.

        Args:
            request ([`ImageRequest`]): The request.
            states: Its encoded prompt; `None` for a class.

        Returns:
            The request to the engine, and the parameters to store in the image, both with the seed 0.

        Raises:
            ValueError: If something does not fit the checkpoint; a [`~llamagen_hf.arguments.FieldError`] where that
                is a single field.
        """

    @abstractmethod
    def count_tokens(self, request: EngineRequest) -> TokenCounts:
        """Size of a request; `output` is the number of latents that the engine yields."""

    @abstractmethod
    def decode(self, items: list[tuple[EngineRequest, list]]) -> list[Image.Image]:
        """Decode images.

        Args:
            items (`list[tuple[EngineRequest, list]]`):
                Requests, and the latents that the engine yielded so far: all of them, or the first ones for a preview.
        """
