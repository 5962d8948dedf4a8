"""What a client asks for, and what it gets."""

from dataclasses import dataclass, field

from ..llamagen.inputs import GenerationInputs
from .front import ImageFile


MAX_SEED = 2**53 - 1  # what numbers in JSON hold exactly everywhere


@dataclass(frozen=True)
class Order:
    """What a client asks for. `None` is the checkpoint's default, and without a seed each image gets any.

    `field_names` are the client's names of arguments of the pipeline, where they differ.
    """

    prompt: str | None = None
    class_label: int | str | None = None
    n: int = 1
    seed: int | None = None
    guidance_scale: float | None = None
    guidance_interval: int = -1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    upload: bytes | None = None
    mask: bytes | None = None
    keep_rows: int | None = None
    file: ImageFile = ImageFile()
    partial_images: int = 0
    timeout: float | None = None
    field_names: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> GenerationInputs:
        """As the pipeline would be asked for one image, an upload not among it."""
        return GenerationInputs(
            prompt=self.prompt,
            class_labels=self.class_label,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


@dataclass(frozen=True)
class FinishedImage:
    """An image for the client: its place in the order, its file, its seed, and how many codes of which kind."""

    index: int
    file: bytes
    seed: int
    condition_tokens: int
    kept_codes: int
    drawn_codes: int
    is_cached: bool

    @property
    def facts(self) -> dict:
        names = ("condition_tokens", "kept_codes", "drawn_codes")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Preview:
    """A partial image: the place of the image, its own number, and the file."""

    index: int
    number: int
    file: bytes
