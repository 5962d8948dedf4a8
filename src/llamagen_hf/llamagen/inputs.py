"""What a drawing is asked for, checked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from ..arguments import FieldError, is_count, is_integer, plain
from ..reranking import Scorer
from .configuration import LlamaGenConfig


SAMPLING_SETTINGS = ("guidance_scale", "guidance_interval", "temperature", "top_k", "top_p")
NUMBERS = (
    *SAMPLING_SETTINGS,
    "class_labels",
    "num_images_per_prompt",
    "keep_rows",
    "num_candidates",
    "height",
    "width",
)
OUTPUT_TYPES = ("pil", "np", "pt", "codes")


@dataclass
class GenerationInputs:
    """The arguments of a drawing. [`AutoregressiveImagePipeline.__call__`] says what each of them is."""

    prompt: str | list[str] | None = None
    class_labels: int | str | list[int | str] | torch.Tensor | None = None
    guidance_scale: float | None = None
    guidance_interval: int = -1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_images_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.Tensor | None = None
    image: Image.Image | list[Image.Image] | torch.Tensor | None = None
    keep_rows: int | None = None
    prefix_codes: torch.Tensor | None = None
    num_candidates: int = 1
    scorer: Scorer | None = None
    output_type: str = "pil"
    height: int | None = None
    width: int | None = None

    def __post_init__(self):
        if isinstance(self.class_labels, (torch.Tensor, np.ndarray)):
            self.class_labels = self.class_labels.flatten().tolist()
        elif isinstance(self.class_labels, list):
            self.class_labels = [plain(label) for label in self.class_labels]
        for name in NUMBERS:
            setattr(self, name, plain(getattr(self, name)))

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

    @property
    def sampling(self) -> dict[str, float | None]:
        """The sampling settings as given, `None` where the checkpoint decides."""
        return {name: getattr(self, name) for name in SAMPLING_SETTINGS}

    def check(
        self,
        config: LlamaGenConfig,
        image_size: int,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Raise a [`FieldError`] of one sentence if the arguments do not fit each other or the checkpoint.

        Args:
            config ([`LlamaGenConfig`]): The generator's.
            image_size (`int`): Side of the checkpoint's images.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The text encoder's, if there is one.
        """
        self._check_condition(config, tokenizer)
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
        self._check_generator()
        self._check_start(config, image_size)
        if not is_count(self.num_candidates):
            raise FieldError(
                "num_candidates", f"`num_candidates` is {self.num_candidates}; expected an integer of at least 1."
            )
        if self.num_candidates > 1 and not callable(self.scorer):
            raise FieldError(
                "scorer", "`num_candidates` needs a `scorer` to choose by, such as llamagen_hf.clip.CLIPScorer."
            )

    def _check_condition(self, config: LlamaGenConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
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
            if not isinstance(self.prompt, str) and not (
                isinstance(self.prompt, list) and all(isinstance(text, str) for text in self.prompt)
            ):
                raise FieldError(
                    "prompt", f"`prompt` must be a string or a list of strings, not {type(self.prompt).__name__}."
                )
            if tokenizer is None:
                raise FieldError(
                    "prompt",
                    "This pipeline has no text encoder and tokenizer: load them with it, or pass `prompt_embeds`.",
                )
        if self.prompt == []:
            raise FieldError("prompt", "`prompt` is an empty list; pass at least one prompt.")
        if self.class_labels is not None:
            labels = self.class_labels if isinstance(self.class_labels, list) else [self.class_labels]
            if not all(isinstance(label, (int, str)) and not isinstance(label, bool) for label in labels):
                raise FieldError(
                    "class_labels", f"`class_labels` must be class ids or names, not {self.class_labels!r}."
                )
        if self.class_labels == []:
            raise FieldError("class_labels", "`class_labels` is an empty list; pass at least one class.")
        embeds, mask = self.prompt_embeds, self.prompt_attention_mask
        if embeds is not None:
            expected = (config.condition_length, config.condition_dim)
            if not isinstance(embeds, torch.Tensor):
                raise FieldError("prompt_embeds", f"`prompt_embeds` must be a tensor, not {type(embeds).__name__}.")
            if embeds.ndim != 3 or tuple(embeds.shape[1:]) != expected or len(embeds) == 0:
                raise FieldError(
                    "prompt_embeds",
                    f"`prompt_embeds` has shape {tuple(embeds.shape)}; "
                    f"expected (batch, {expected[0]}, {expected[1]}).",
                )
        if mask is not None:
            if embeds is None:
                raise FieldError(
                    "prompt_attention_mask", "`prompt_attention_mask` goes with `prompt_embeds`, which is missing."
                )
            if mask.shape != embeds.shape[:2]:
                raise FieldError(
                    "prompt_attention_mask",
                    f"`prompt_attention_mask` has shape {tuple(mask.shape)}; expected {tuple(embeds.shape[:2])}.",
                )

    def _check_generator(self) -> None:
        if not isinstance(self.generator, (torch.Generator, list, type(None))):
            raise FieldError(
                "generator", f"`generator` must be a torch.Generator or a list of them, not {self.generator!r}."
            )
        if isinstance(self.generator, list) and len(self.generator) != self.num_images:
            raise FieldError(
                "generator",
                f"`generator` is a list of {len(self.generator)}, but {self.num_images} images are to be drawn.",
            )

    def _check_start(self, config: LlamaGenConfig, image_size: int) -> None:
        """Check `image`, `keep_rows` and `prefix_codes`, with which a drawing does not start from nothing."""
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
