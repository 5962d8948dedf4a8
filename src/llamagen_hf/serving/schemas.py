"""Bodies of requests and answers: OpenAI's images API, and the fields that are ours."""

from typing import Annotated, Literal

from fastapi import File, UploadFile
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from .front import FrontPipeline, PictureFile
from .order import MAX_SEED, Order
from .settings import ServingSettings


MAX_PROMPT = 2000  # characters: many times what a condition holds, and cleaning takes the square of it
MAX_PARTIAL_IMAGES = 64

Unused = "Accepted, since OpenAI's clients send it, and without effect."


class DrawingFields(BaseModel):
    """What drawings and completions have in common; [`build_bodies`] adds what depends on the checkpoint."""

    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Of the first image; each further one adds 1. The same seed and settings give the same image.",
    )
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = Field(
        "png", description="A PNG holds the parameters that made it, prompt and seed among them."
    )
    output_compression: int = Field(100, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(
        0,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        description="With `stream`, previews of each image; fewer if the server is slow at making them.",
    )
    guidance_scale: float | None = Field(
        None, ge=0, le=1000, allow_inf_nan=False, description="Strength of guidance, 1 for none."
    )
    guidance_interval: int = Field(-1, ge=-1, le=2**31, description="Guide the first n + 2 codes only; -1 for all.")
    temperature: float | None = Field(
        None, ge=0, le=1000, allow_inf_nan=False, description="0 for the likeliest codes."
    )
    top_k: int | None = Field(None, ge=0, le=2**31, description="Codes to draw from, 0 for all.")
    top_p: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Probability to draw from, 1 for all."
    )
    timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds after which to give up, if the server's limit is later."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description=Unused
    )
    user: str | None = Field(None, max_length=MAX_PROMPT, description=Unused)
    safety_identifier: str | None = Field(None, max_length=MAX_PROMPT, description=Unused)

    def order(self, upload: bytes | None = None) -> Order:
        """For the service."""
        same = ("n", "seed", "guidance_scale", "guidance_interval", "temperature", "top_k", "top_p", "timeout")
        label = getattr(self, "class_label", None)
        if not hasattr(self, "class_label"):
            condition = {"prompt": self.prompt}
        elif label is None:
            condition = {"class_label": self.prompt}
        else:
            condition = {"class_label": label, "prompt": self.prompt or None}
        return Order(
            **condition,
            **{name: getattr(self, name) for name in same},
            upload=upload,
            keep_rows=getattr(self, "keep_rows", None),
            file=PictureFile(self.output_format, self.output_compression),
            partial_images=self.partial_images if self.stream else 0,
        )


def whole_numbers(fields: object) -> object:
    """JSON does not tell 2.0 from 2."""
    if not isinstance(fields, dict):
        return fields
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in fields.items()
    }


def build_bodies(pipe: FrontPipeline, settings: ServingSettings) -> tuple[type[DrawingFields], type[DrawingFields]]:
    """The bodies of drawings (JSON) and of completions (a form), as far as a checkpoint takes them.

    So the OpenAPI page says what this server accepts: its image size, its number of rows, prompt or class.
    """
    config, size = pipe.transformer.config, f"{pipe.image_size}x{pipe.image_size}"
    if pipe.is_text_conditional:
        prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description="What to draw.")]
        fields = {"prompt": (prompt, ...)}
    else:
        text = "Name of the class, unless `class_label` says it."
        fields = {"prompt": (Annotated[str | None, Field(max_length=MAX_PROMPT, description=text)], None)}
        label = Annotated[str, Field(max_length=MAX_PROMPT)] | Annotated[int, Field(ge=0, lt=config.num_classes)]
        fields["class_label"] = (Annotated[label | None, Field(description="Class by id or by name.")], None)
    fields |= {
        "n": (Annotated[int, Field(ge=1, le=settings.max_images, description="Number of images.")], 1),
        "size": (Annotated[Literal["auto", size], Field(description="What this checkpoint draws.")], "auto"),
        "model": (Annotated[Literal[settings.model_name] | None, Field(description="The one there is.")], None),
    }
    drawing = create_model(
        "ImageGeneration",
        __base__=DrawingFields,
        __validators__={"whole_numbers": model_validator(mode="before")(whole_numbers)},
        style=(Annotated[Literal["vivid", "natural"] | None, Field(description=Unused)], None),
        moderation=(Annotated[Literal["low", "auto"] | None, Field(description=Unused)], None),
        **fields,
    )
    drawing.model_config = ConfigDict(extra="forbid", strict=True)
    drawing.model_rebuild(force=True)
    rows = f"Rows of codes to keep, out of {config.grid_size}. Default: the upper half."
    completion = create_model(
        "ImageEdit",
        __base__=DrawingFields,
        image=(Annotated[UploadFile, File(description="The picture whose lower part is drawn anew.")], ...),
        keep_rows=(Annotated[int | None, Field(ge=0, lt=config.grid_size, description=rows)], None),
        input_fidelity=(Annotated[Literal["high", "low"] | None, Field(description=Unused)], None),
        **fields,
    )
    completion.model_config = ConfigDict(extra="forbid")
    completion.model_rebuild(force=True)
    return drawing, completion


class InputTokensDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Counted in positions of the generator: words of the prompt (or 1 for a class), codes kept, codes drawn."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


class ImageData(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="What draws this image again.")


class ImagesResponse(BaseModel):
    created: int = Field(description="Seconds since 1970.")
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    data: list[ImageData]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    status: str
