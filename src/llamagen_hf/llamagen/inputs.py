"""The arguments of a generation: checked, and prepared as tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..arguments import FieldError, is_count, is_integer, plain
from ..conditioning.checks import check_mask, check_prompt, check_states
from ..conditioning.classes import resolve_class_label
from ..provenance import describe
from ..reproducibility import check_generator
from ..reranking import Scorer, check_candidates
from .configuration import LlamaGenConfig
from .sampling import SamplingParams


OUTPUT_TYPES = ("pil", "np", "pt", "codes")


@dataclass(frozen=True, kw_only=True)
class GenerationInputs(SamplingParams):
    """The arguments of a call. [`AutoregressiveImagePipeline.__call__`] says what each of them is."""

    prompt: str | list[str] | None = None
    class_labels: int | str | list[int | str] | torch.Tensor | None = None
    num_images_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.Tensor | None = None
    image: Image.Image | list[Image.Image] | torch.Tensor | None = None
    keep_rows: int | None = None
    prefix_codes: torch.Tensor | None = None
    num_candidates: int = 1
    scorer: Scorer | None = None
    decoding_window: int | Literal["auto"] = 1
    output_type: str = "pil"
    height: int | None = None
    width: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_images_per_prompt", "keep_rows", "num_candidates", "height", "width", "decoding_window"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "class_labels", plain_labels(self.class_labels))

    @property
    def conditions(self) -> Sequence:
        """The prompts, classes or text states, one for each `num_images_per_prompt` images."""
        for given in (self.prompt, self.class_labels, self.prompt_embeds):
            if given is not None:
                return [given] if isinstance(given, (str, int)) else given

    @property
    def num_images(self) -> int:
        """Images to return."""
        return len(self.conditions) * self.num_images_per_prompt

    @property
    def num_drawn(self) -> int:
        """Images to draw, candidates included."""
        return self.num_images * self.num_candidates

    def check(
        self,
        config: LlamaGenConfig,
        image_size: int | None,
        reads_prompts: bool,
    ) -> None:
        """Check the arguments against each other and the checkpoint.

        Args:
            config ([`LlamaGenConfig`]): The configuration of the generator.
            image_size (`int`, *optional*): Side of the images in pixels; `None` if there is no image tokenizer.
            reads_prompts (`bool`): Whether there is a text encoder with its tokenizer.

        Raises:
            FieldError: If an argument does not fit.
        """
        self._check_condition(config, reads_prompts)
        if not is_count(self.num_images_per_prompt):
            raise FieldError(
                "num_images_per_prompt",
                f"`num_images_per_prompt` is {self.num_images_per_prompt}; expected an integer of at least 1.",
            )
        if self.output_type not in OUTPUT_TYPES:
            raise FieldError(
                "output_type", f"`output_type` is {self.output_type!r}; expected 'pil', 'np', 'pt' or 'codes'."
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None and (isinstance(side, bool) or side != image_size):
                raise FieldError(
                    name, f"`{name}` is {side}; this checkpoint draws {image_size}x{image_size} pixels only."
                )
        if self.decoding_window != "auto" and not is_count(self.decoding_window):
            raise FieldError(
                "decoding_window",
                f"`decoding_window` is {self.decoding_window!r}; expected an integer of at least 1, or 'auto'.",
            )
        check_generator(self.generator, self.num_images)
        self._check_start(config, image_size)
        check_candidates(self.num_candidates, self.scorer, needs_scorer=False)

    def prepare(
        self,
        config: LlamaGenConfig,
        image_size: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        sampling_defaults: Mapping[str, float] | None = None,
        encode_prompt: Callable | None = None,
        encode_image: Callable | None = None,
    ) -> "PreparedInputs":
        """Check the arguments and turn them into what a generator reads. Pipeline, server and vLLM all start here.

        Args:
            config ([`LlamaGenConfig`]): The configuration of the generator.
            image_size (`int`, *optional*): Side of the images in pixels, if there is an image tokenizer.
            device (`torch.device`, *optional*): Where the tensors go.
            dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of text states.
            sampling_defaults (`Mapping[str, float]`, *optional*): In place of settings that are `None`.
            encode_prompt (`Callable`, *optional*): Turns prompts into text states and their mask.
            encode_image (`Callable`, *optional*): Turns images into grids of codes.

        Raises:
            FieldError: If an argument does not fit the others or the checkpoint.
        """
        self.check(config, image_size, encode_prompt is not None)
        params = self.filled(sampling_defaults)
        params.check_sampling()
        if config.conditioning == "class":
            ids = class_ids(config, self.class_labels)
            names = [(config.id2label or {}).get(i, str(i)) for i in (ids - config.vocab_size).tolist()]
            tensors = {"class_ids": ids.to(device)}
        else:
            embeds, mask = self.prompt_embeds, self.prompt_attention_mask
            if embeds is None:
                embeds, mask = encode_prompt(self.prompt)
            elif mask is None:
                mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            names = [None] * len(embeds) if self.prompt is None else self.conditions
            tensors = {
                "prompt_embeds": embeds.to(device, dtype),
                "prompt_attention_mask": mask.to(device, torch.long),
            }
        prefix = self.prefix_codes
        if self.image is not None:
            prefix = encode_image(self.image)[:, : self.keep_rows].flatten(1)
        if prefix is not None:
            # One for all images, one for each condition, or one for each image: candidates share theirs.
            prefix = prefix.to(device, torch.long)
            tensors["prefix_codes"] = prefix.repeat_interleave(self.num_images // len(prefix), 0)
        tensors = {name: value.repeat_interleave(self.num_drawn // len(value), 0) for name, value in tensors.items()}
        names = [name for name in names for _ in range(self.num_drawn // len(names))]
        return PreparedInputs(self, tensors, names, params)

    def _check_condition(self, config: LlamaGenConfig, reads_prompts: bool) -> None:
        names = ("prompt", "class_labels", "prompt_embeds")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"`{name}`" for name in given) or "none of them"
            raise FieldError(
                "prompt", f"Pass exactly one of `prompt`, `class_labels` and `prompt_embeds`; found {found}."
            )
        is_text = config.conditioning == "text"
        if is_text and self.class_labels is not None:
            raise FieldError("class_labels", "This checkpoint is text-conditional: pass `prompt`, not `class_labels`.")
        if not is_text and self.class_labels is None:
            raise FieldError(given[0], f"This checkpoint is class-conditional: pass `class_labels`, not `{given[0]}`.")
        if self.prompt is not None:
            check_prompt(self.prompt, reads_prompts)
        if self.class_labels is not None:
            labels = self.class_labels if isinstance(self.class_labels, list) else [self.class_labels]
            if not all(isinstance(label, (int, str)) and not isinstance(label, bool) for label in labels):
                raise FieldError(
                    "class_labels", f"`class_labels` must be class ids or names, not {self.class_labels!r}."
                )
        if self.class_labels == []:
            raise FieldError("class_labels", "`class_labels` is an empty list; pass at least one class.")
        if self.prompt_embeds is not None:
            size = config.condition_length, config.condition_dim
            check_states(self.prompt_embeds, *size, mask=self.prompt_attention_mask)
        check_mask(self.prompt_attention_mask, self.prompt_embeds)

    def _check_start(self, config: LlamaGenConfig, image_size: int | None) -> None:
        """Check `image`, `keep_rows` and `prefix_codes`, with which a generation begins."""
        counts = sorted({1, len(self.conditions), self.num_images})
        expected = " or ".join(map(str, counts))
        if self.image is None:
            if self.keep_rows is not None:
                raise FieldError("keep_rows", "`keep_rows` says how much of `image` to keep, which is missing.")
        elif self.prefix_codes is not None:
            raise FieldError("prefix_codes", "Pass `image` or `prefix_codes`, not both.")
        elif isinstance(self.image, torch.Tensor):
            if self.image.shape[1:] != (3, image_size, image_size):
                raise FieldError(
                    "image",
                    f"`image` has shape {tuple(self.image.shape)}; expected (batch, 3, {image_size}, {image_size}).",
                )
            if not (0 <= self.image.min() and self.image.max() <= 1):
                raise FieldError("image", "`image` as a tensor must be in [0, 1].")
        elif not isinstance(self.image, Image.Image) and not (
            isinstance(self.image, list) and all(isinstance(image, Image.Image) for image in self.image)
        ):
            raise FieldError(
                "image", f"`image` must be a PIL image, a list of them or a tensor, not {type(self.image).__name__}."
            )
        if self.image is not None:
            count = 1 if isinstance(self.image, Image.Image) else len(self.image)
            if count not in counts:
                raise FieldError("image", f"`image` holds {count} images, but {expected} are needed.")
            last = config.grid_size - 1
            if not is_integer(self.keep_rows) or not 0 <= self.keep_rows <= last:
                raise FieldError(
                    "keep_rows",
                    f"`keep_rows` is {self.keep_rows}; with `image`, expected an integer from 0 to {last}.",
                )
        codes = self.prefix_codes
        if codes is not None:
            if not isinstance(codes, torch.Tensor) or codes.is_floating_point() or codes.ndim != 2:
                raise FieldError("prefix_codes", "`prefix_codes` must be an integer tensor of shape (batch, n).")
            if len(codes) not in counts or codes.shape[1] >= config.num_codes:
                raise FieldError(
                    "prefix_codes",
                    f"`prefix_codes` has shape {tuple(codes.shape)}; expected {expected} rows of fewer than "
                    f"{config.num_codes} codes.",
                )
            if codes.numel() and not (0 <= codes.min() and codes.max() < config.vocab_size):
                raise FieldError(
                    "prefix_codes",
                    f"`prefix_codes` holds {int(codes.min())}..{int(codes.max())}; "
                    f"expected 0..{config.vocab_size - 1}.",
                )


@dataclass
class PreparedInputs:
    """What a generator reads, a row for each image to draw, candidates included.

    Args:
        inputs ([`GenerationInputs`]): The arguments of the call.
        tensors (`dict[str, torch.Tensor]`): `class_ids` `(batch,)` or `prompt_embeds` `(batch, condition_length,
            condition_dim)` and `prompt_attention_mask` `(batch, condition_length)`; `prefix_codes` `(batch, n)` if
            some codes are kept; of a pipeline also `noise_keys` `(batch,)`.
        names (`list[str | None]`): Prompt or name of the class; `None` where only text states were given.
        params ([`~llamagen_hf.llamagen.sampling.SamplingParams`]): The settings, none of them `None`.
        decoding_window (`int`, *optional*, defaults to 1): Codes of an image that a step draws.
        parameters (`list[dict]`, *optional*): What makes each image, see [`describe`].
    """

    inputs: GenerationInputs
    tensors: dict[str, torch.Tensor]
    names: list[str | None]
    params: SamplingParams
    decoding_window: int = 1
    parameters: list[dict] | None = None

    @property
    def arguments(self) -> dict:
        """Those of [`~llamagen_hf.llamagen.decoding.CodeDecoder.stream`]."""
        return self.tensors | self.params.sampling | {"decoding_window": self.decoding_window}

    @property
    def prefix_codes(self) -> torch.LongTensor | None:
        """The codes `(batch, n)` that are kept, if any."""
        return self.tensors.get("prefix_codes")

    def describe(self, generators: list[torch.Generator], facts: dict) -> list[dict]:
        """The parameters of each image that is drawn from `generators`, see [`~llamagen_hf.provenance.describe`]."""
        inputs, count = self.inputs, len(generators)
        conditions = [{}] * count
        if inputs.prompt_embeds is None:
            name = "prompt" if inputs.prompt is not None else "class_labels"
            each = count // len(inputs.conditions)
            conditions = [{name: condition} for condition in inputs.conditions for _ in range(each)]
        prefixes = [[]] * count if self.prefix_codes is None else self.prefix_codes.tolist()
        own = [{"prefix_codes": codes, "decoding_window": self.decoding_window} for codes in prefixes]
        return describe(conditions, self.params.sampling, generators, facts, own)


def plain_labels(class_labels):
    """Classes in arrays of numpy and torch as Python's numbers."""
    if isinstance(class_labels, (torch.Tensor, np.ndarray)):
        return class_labels.flatten().tolist()
    return [plain(label) for label in class_labels] if isinstance(class_labels, list) else plain(class_labels)


def class_ids(config: LlamaGenConfig, class_labels: int | str | list[int | str]) -> torch.LongTensor:
    """Input ids `(batch,)` of classes given by id or by name.

    Raises:
        FieldError: If there is no such class.
    """
    labels = plain_labels(class_labels)
    labels = [labels] if isinstance(labels, (int, str)) else labels
    ids = [resolve_class_label(label, config.num_classes, config.id2label) for label in labels]
    return config.vocab_size + torch.tensor(ids, device="cpu")
