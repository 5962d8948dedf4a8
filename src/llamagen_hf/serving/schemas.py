"""Bodies of requests and answers: OpenAI's images API, and the fields that are ours."""

from typing import Annotated, Any, Literal

from fastapi import File, UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

from .front import MEDIA_TYPES, FrontPipeline, ImageFile
from .order import MAX_SEED, Order
from .settings import ServingSettings


MAX_PROMPT = 2000  # characters: many times what a condition holds, and cleaning takes the square of it
MAX_PARTIAL_IMAGES = 64
MAX_SIDE = 2048  # pixels that an image is scaled to

Unused = "Accepted, since OpenAI's clients send it, and without effect."


class RequestFields(BaseModel):
    """A body, or a part of one, in which `null` is as good as nothing."""

    @model_validator(mode="before")
    @classmethod
    def leave_out_nulls(cls, fields: Any) -> Any:
        """Many clients send all fields that they know."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class SamplingFields(RequestFields):
    """What all requests have in common."""

    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Of the first image; each further one adds 1. The same seed and settings give the same image.",
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        "png", description="A PNG holds the parameters that made it, prompt and seed among them."
    )
    output_compression: int | None = Field(100, ge=0, le=100, description="Quality of JPEG and WebP.")
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
    timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds after which to give up, if the server's limit is later."
    )

    @property
    def side(self) -> int | None:
        """Pixels that images are scaled to, if others than the checkpoint's were asked for."""
        return None

    def to_order(self, **more) -> Order:
        """For the service."""
        same = ("seed", "guidance_scale", "guidance_interval", "temperature", "top_k", "top_p", "timeout")
        return Order(
            **{name: getattr(self, name) for name in same},
            file=ImageFile(self.output_format, self.output_compression, self.side),
            **more,
        )


class GenerationFields(SamplingFields):
    """What drawings and completions have in common; [`build_bodies`] adds what depends on the checkpoint."""

    stream: bool | None = Field(False, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        0,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        description="With `stream`, previews of each image; fewer if the server is slow at making them.",
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        None, description=Unused
    )
    style: Literal["vivid", "natural"] | None = Field(None, description=Unused)
    moderation: Literal["low", "auto"] | None = Field(None, description=Unused)
    user: str | None = Field(None, max_length=MAX_PROMPT, description=Unused)
    safety_identifier: str | None = Field(None, max_length=MAX_PROMPT, description=Unused)

    @property
    def side(self) -> int | None:
        return None if self.size == "auto" else min(map(int, self.size.split("x")))

    def to_order(self, **more) -> Order:
        return super().to_order(
            **name_condition(self, self.prompt, "prompt"),
            n=self.n,
            partial_images=self.partial_images if self.stream else 0,
            **more,
        )


class TextToImageParameters(SamplingFields):
    """What Hugging Face's clients send beside the prompt, as far as it means anything here."""

    @property
    def side(self) -> int | None:
        return min((side for side in (self.width, self.height) if side is not None), default=None)


class TextToImageFields(RequestFields):
    """A request of Hugging Face's inference clients: a prompt, and parameters beside it."""

    def to_order(self, accept: str) -> Order:
        """For the service; `accept` is the media type that the client wants, where `output_format` does not say it."""
        parameters = self.parameters
        if "output_format" not in parameters.model_fields_set:
            formats = {media_type: format for format, media_type in MEDIA_TYPES.items()}
            parameters.output_format = formats.get(accept, "png")
        return parameters.to_order(**name_condition(parameters, self.inputs, "inputs"))


def name_condition(fields: BaseModel, prompt: str | None, name: str) -> dict[str, Any]:
    """The part of an order that says what to draw, and what the client calls it."""
    if not hasattr(fields, "class_label"):
        return {"prompt": prompt, "field_names": {"prompt": name}}
    if fields.class_label is None:
        return {"class_label": prompt, "field_names": {"prompt": name, "class_labels": name}}
    return {"class_label": fields.class_label, "prompt": prompt or None, "field_names": {"prompt": name}}


def whole_numbers(fields: object) -> object:
    """JSON does not tell 2.0 from 2."""
    if not isinstance(fields, dict):
        return fields
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in fields.items()
    }


def leave_out_empty(fields: object) -> object:
    """A form has no other way to say nothing."""
    return {name: value for name, value in fields.items() if value != ""} if isinstance(fields, dict) else fields


def check_size(size: str) -> str:
    """Raise a `ValueError` unless images can be scaled to this."""
    width, _, height = size.partition("x")
    if size != "auto" and not all(
        len(side) <= 4 and side.isascii() and side.isdigit() and 1 <= int(side) <= MAX_SIDE for side in (width, height)
    ):
        raise ValueError(f"expected 'auto' or WIDTHxHEIGHT, from 1x1 to {MAX_SIDE}x{MAX_SIDE}")
    return size


def build_bodies(
    pipe: FrontPipeline, settings: ServingSettings
) -> tuple[type[GenerationFields], type[GenerationFields], type[BaseModel]]:
    """Bodies of drawings (JSON), completions (a form) and Hugging Face's requests, as far as a checkpoint takes them.

    So the OpenAPI page says what this server accepts: its image size, its number of rows, prompt or class.
    """
    config, native = pipe.transformer.config, pipe.image_size
    # Beside what a body has, anything may be null.
    json_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}})
    json_validators = {"whole_numbers": model_validator(mode="before")(whole_numbers)}
    label = Annotated[str, Field(max_length=MAX_PROMPT)]
    label = label | Annotated[int, Field(ge=0, lt=config.num_classes or 1)]
    label = (Annotated[label | None, Field(description="Class by id or by name.")], None)
    if pipe.is_text_conditional:
        prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description="What to draw.")]
        fields, parameters = {"prompt": (prompt, ...)}, {}
        inputs = prompt
    else:
        text = "Name or id of the class, unless `class_label` says it."
        inputs = Annotated[str | None, Field(max_length=MAX_PROMPT, description=text)]
        fields, parameters = {"prompt": (inputs, None), "class_label": label}, {"class_label": label}
    if settings.any_size:
        text = f"Images are drawn at {native}x{native} and scaled to the largest square that fits."
        size = Annotated[str | None, AfterValidator(check_size), Field(description=text)]
        length = Annotated[int | None, Field(ge=1, le=MAX_SIDE, description=text)]
    else:
        text = "What this checkpoint draws."
        size = Annotated[Literal["auto", f"{native}x{native}"] | None, Field(description=text)]
        length = Annotated[Literal[native] | None, Field(description=text)]
    fields |= {
        "n": (Annotated[int | None, Field(ge=1, le=settings.max_images, description="Number of images.")], 1),
        "size": (size, "auto"),
        "model": (Annotated[Literal[settings.model_name] | None, Field(description="The one there is.")], None),
        "response_format": (Literal["b64_json", "url"] | None, settings.response_format),
    }
    drawing = create_model("ImageGeneration", __base__=GenerationFields, __validators__=json_validators, **fields)
    rows = f"Rows of codes to keep, out of {config.grid_size}. Default: what `mask` keeps, or else the upper half."
    mask = "Of the size of the image, and transparent from some row down to the bottom: that part is drawn anew."
    image = Annotated[list[UploadFile], File(description="The image whose lower part is drawn anew.")]
    completion = create_model(
        "ImageEdit",
        __base__=GenerationFields,
        __validators__={"leave_out_empty": model_validator(mode="before")(leave_out_empty)},
        image=(image, []),
        image_list=(Annotated[image, Field(alias="image[]")], []),
        mask=(Annotated[UploadFile | None, File(description=mask)], None),
        keep_rows=(Annotated[int | None, Field(ge=0, lt=config.grid_size, description=rows)], None),
        input_fidelity=(Annotated[Literal["high", "low"] | None, Field(description=Unused)], None),
        **fields,
    )
    parameters |= {"width": (length, None), "height": (length, None)}
    parameters = create_model(
        "TextToImageParameters", __base__=TextToImageParameters, __validators__=json_validators, **parameters
    )
    for model, model_config in ((drawing, json_config), (parameters, json_config), (completion, {"extra": "forbid"})):
        model.model_config = ConfigDict(**model_config)
        model.model_rebuild(force=True)
    text_to_image = create_model(
        "TextToImage",
        __base__=TextToImageFields,
        inputs=(inputs, ... if pipe.is_text_conditional else None),
        parameters=(parameters | None, Field(default_factory=parameters)),
    )
    text_to_image.model_config = json_config
    text_to_image.model_rebuild(force=True)
    return drawing, completion, text_to_image


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
