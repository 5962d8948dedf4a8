"""Bodies of requests and answers: OpenAI's images API, and the fields that are ours."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from fastapi import File, UploadFile
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

from .frontend import MEDIA_TYPES, Frontend, ImageRequest
from .service import MAX_SEED, GeneratedImage
from .settings import ServingSettings


MAX_PROMPT = 2000  # characters: many times what a condition holds; cleaning takes quadratic time
MAX_PARTIAL_IMAGES = 64
MAX_SIDE = 2048  # pixels that an image is scaled to

Unused = "Accepted, since OpenAI's clients send it, and without effect."


class RequestFields(BaseModel):
    """A body, or a part of one. `null` means the same as a missing field, since many clients send all they know."""

    missing: ClassVar[tuple] = (None,)

    @model_validator(mode="before")
    @classmethod
    def normalize(cls, fields: Any) -> Any:
        """Leave out what means the same as a missing field. JSON does not distinguish 2.0 from 2."""
        if not isinstance(fields, dict):
            return fields
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in fields.items()
            if value not in cls.missing
        }


class JSONFields(RequestFields):
    """A body that is JSON. Beside its fields, any other may be null."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"additionalProperties": {"type": "null"}}
    )


class FormFields(RequestFields):
    """A body that is a form, where an empty field is a missing one, too."""

    model_config = ConfigDict(extra="forbid")
    missing: ClassVar[tuple] = (None, "")


class ImageFields(BaseModel):
    """Fields that all requests have in common."""

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
    timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds after which to give up, if the server's limit is later."
    )

    @property
    def side(self) -> int | None:
        """Pixels that images are scaled to, if the request asks for another size than the checkpoint's."""
        return None

    def to_request(self, frontend: Frontend, prompt: str | None, prompt_name: str, **more) -> ImageRequest:
        """The request for the service.

        Args:
            frontend ([`Frontend`]): Names its own fields.
            prompt (`str`, *optional*): The prompt.
            prompt_name (`str`): What the client calls it.
            more: Further arguments of [`ImageRequest`].
        """
        condition = {"prompt": prompt, "field_names": {"prompt": prompt_name}}
        if frontend.pipe.condition_kind == "class" and self.class_label is not None:
            condition |= {"class_label": self.class_label, "prompt": prompt or None}
        elif frontend.pipe.condition_kind == "class":
            names = {"prompt": prompt_name, "class_labels": prompt_name}
            condition = {"class_label": prompt, "field_names": names}
        return ImageRequest(
            **condition,
            seed=self.seed,
            settings=self.model_dump(
                include=frontend.sampling_fields.model_fields.keys() | (frontend.edit_fields or {})
            ),
            output_format=self.output_format,
            quality=self.output_compression,
            side=self.side,
            timeout=self.timeout,
            **more,
        )


class GenerationFields(ImageFields):
    """Fields of generations, edits and variations; [`build_bodies`] adds those that depend on the checkpoint."""

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

    def to_request(self, frontend: Frontend, **more) -> ImageRequest:
        partial_images = self.partial_images if self.stream else 0
        return super().to_request(frontend, self.prompt, "prompt", n=self.n, partial_images=partial_images, **more)


class VariationFields(GenerationFields):
    """Fields of variations, which have no prompt."""

    prompt: ClassVar[None] = None


class TextToImageParameters(ImageFields):
    """Parameters that Hugging Face's clients send beside the prompt."""

    @property
    def side(self) -> int | None:
        return min((side for side in (self.width, self.height) if side is not None), default=None)


class TextToImageFields(JSONFields):
    """A request of Hugging Face's inference clients: a prompt, and parameters beside it."""

    def to_request(self, frontend: Frontend, accept: str) -> ImageRequest:
        """The request for the service.

        Args:
            frontend ([`Frontend`]): Names its own fields.
            accept (`str`): Media type that the client wants, if there is no `output_format`.
        """
        parameters = self.parameters
        if "output_format" not in parameters.model_fields_set:
            formats = {media_type: format for format, media_type in MEDIA_TYPES.items()}
            parameters.output_format = formats.get(accept, "png")
        return parameters.to_request(frontend, self.inputs, "inputs")


class Bodies(NamedTuple):
    """The bodies of requests as one checkpoint takes them; `edit` and `variation` are `None` if it draws none."""

    generation: type[GenerationFields]
    edit: type[GenerationFields] | None
    variation: type[VariationFields] | None
    text_to_image: type[TextToImageFields]

    @property
    def field_names(self) -> set[str]:
        """The names of all fields."""
        parameters = self.text_to_image.model_fields["parameters"].default_factory
        return {name for body in (*self, parameters) if body is not None for name in body.model_fields}


def check_size(size: str) -> str:
    """Raise a `ValueError` unless images can be scaled to this size."""
    width, _, height = size.partition("x")
    if size != "auto" and not all(
        len(side) <= 4 and side.isascii() and side.isdigit() and 1 <= int(side) <= MAX_SIDE for side in (width, height)
    ):
        raise ValueError(f"expected 'auto' or WIDTHxHEIGHT, from 1x1 to {MAX_SIDE}x{MAX_SIDE}")
    return size


def build_bodies(frontend: Frontend, settings: ServingSettings) -> Bodies:
    """Bodies of generations (JSON), edits and variations (forms) and Hugging Face's requests.

    So the OpenAPI page says what this server accepts: its image size, prompt or class, and the family's own fields.
    """
    sizes, sampling_fields = frontend.sizes, frontend.sampling_fields
    names = [f"{side}x{side}" for side in sizes]
    if frontend.pipe.condition_kind == "text":
        prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description="What to draw.")]
        prompt, parameters = (prompt, ...), {}
    else:
        text = "Name or id of the class, unless `class_label` says it."
        prompt = (Annotated[str | None, Field(max_length=MAX_PROMPT, description=text)], None)
        label = Annotated[str, Field(max_length=MAX_PROMPT)]
        label = label | Annotated[int, Field(ge=0, lt=frontend.pipe.num_classes)]
        parameters = {"class_label": (Annotated[label | None, Field(description="Class by id or by name.")], None)}
    if settings.any_size:
        text = f"Images are generated at {' or '.join(names)} and scaled to the largest square that fits."
        size = Annotated[str | None, AfterValidator(check_size), Field(description=text)]
        length = Annotated[int | None, Field(ge=1, le=MAX_SIDE, description=text)]
    else:
        text = "The size of this checkpoint's images." if len(sizes) == 1 else "By default the largest."
        size = Annotated[Literal[("auto", *names)] | None, Field(description=text)]
        length = Annotated[Literal[sizes] | None, Field(description=text)]
    fields = {
        "n": (Annotated[int | None, Field(ge=1, le=settings.max_images, description="Number of images.")], 1),
        "size": (size, "auto"),
        "model": (Annotated[Literal[settings.model_name] | None, Field(description="The only model.")], None),
        "response_format": (Literal["b64_json", "url"] | None, settings.response_format),
    }
    condition, base = parameters | {"prompt": prompt}, (GenerationFields, sampling_fields)
    generation = create_model("ImageGeneration", __base__=(JSONFields, *base), **condition, **fields)
    edit = variation = None
    if frontend.edit_fields is not None:
        mask = "Of the size of the image, and fully transparent where it is to be generated anew."
        edit = create_model(
            "ImageEdit",
            __base__=(FormFields, *base),
            **image_fields("The image to edit."),
            mask=(Annotated[UploadFile | None, File(description=mask)], None),
            input_fidelity=(Annotated[Literal["high", "low"] | None, Field(description=Unused)], None),
            **condition,
            **fields,
            **frontend.edit_fields,
        )
    if frontend.pipe.varies_images:
        varied, base = image_fields("The image to vary."), (FormFields, VariationFields, sampling_fields)
        variation = create_model("ImageVariation", __base__=base, **varied, **fields)
    parameters = create_model(
        "TextToImageParameters",
        __base__=(JSONFields, TextToImageParameters, sampling_fields),
        **parameters,
        width=(length, None),
        height=(length, None),
    )
    text_to_image = create_model(
        "TextToImage",
        __base__=TextToImageFields,
        inputs=prompt,
        parameters=(parameters | None, Field(default_factory=parameters)),
    )
    return Bodies(generation, edit, variation, text_to_image)


def image_fields(description: str) -> dict[str, tuple]:
    """The field of an uploaded image, under both names that clients give it."""
    image = Annotated[list[UploadFile], File(description=description)]
    return {"image": (image, []), "image_list": (Annotated[image, Field(alias="image[]")], [])}


class InputTokensDetails(BaseModel):
    """Parts of the input."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Counted in positions of the generator: words of the prompt (or 1 for a class), codes kept, codes drawn."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


def count_usage(images: list[GeneratedImage]) -> dict:
    """Size of a request, as [`Usage`] has it."""
    text, kept, output = (sum(counts) for counts in zip(*(image.tokens for image in images), strict=True))
    return {
        "input_tokens": text + kept,
        "input_tokens_details": {"text_tokens": text, "image_tokens": kept},
        "output_tokens": output,
        "total_tokens": text + kept + output,
    }


class ImageData(BaseModel):
    """One image of an answer."""

    b64_json: str | None = None
    url: str | None = None
    seed: int = Field(description="Seed that gives this image again.")


class ImagesResponse(BaseModel):
    """Answer with images."""

    created: int = Field(description="Seconds since 1970.")
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    data: list[ImageData]
    usage: Usage


class Model(BaseModel):
    """The checkpoint that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """Answer to `GET /v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Status(BaseModel):
    """Answer to `GET /health` and `GET /ready`."""

    status: str
