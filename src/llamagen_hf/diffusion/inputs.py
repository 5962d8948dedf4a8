"""The arguments of a call of the pixel diffusion pipeline, checked."""

import math
from dataclasses import dataclass

import torch
from PIL import Image

from ..arguments import FieldError, is_count, plain
from ..conditioning.checks import check_mask, check_prompt, check_states
from ..reproducibility import check_generator
from ..reranking import Scorer, check_candidates
from .denoising import Guide
from .schedules import NUM_TIMESTEPS


OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass(frozen=True)
class UNetTraits:
    """What arguments are checked against.

    Args:
        image_size (`int`): Side of the images, in pixels.
        upsamples (`bool`): Whether the U-Net enlarges images.
        condition_dim (`int`, *optional*): Width of the text states; `None` if it reads no text.
        condition_length (`int`): Positions of the text states.
        reads_prompts (`bool`): Whether there is a text encoder with its tokenizer.
    """

    image_size: int
    upsamples: bool
    condition_dim: int | None
    condition_length: int
    reads_prompts: bool


@dataclass(frozen=True, kw_only=True)
class DiffusionInputs:
    """The arguments of a call. [`PixelDiffusionPipeline.__call__`] says what each of them is."""

    prompt: str | list[str] | None = None
    image: Image.Image | list[Image.Image] | torch.Tensor | None = None
    aug_level: float | list[float] | None = None
    negative_prompt: str | list[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_images_per_prompt: int = 1
    generator: torch.Generator | list[torch.Generator] | None = None
    prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    guide: Guide | None = None
    num_candidates: int = 1
    scorer: Scorer | None = None
    output_type: str = "pil"

    def __post_init__(self):
        numbers = ("aug_level", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "num_candidates")
        for name in numbers:
            value = plain(getattr(self, name))
            value = [plain(each) for each in value] if isinstance(value, (list, tuple)) else value
            object.__setattr__(self, name, value)

    @property
    def prompts(self) -> list[str] | None:
        """The prompts; `None` if there are none."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def num_given_images(self) -> int:
        """How many images are to be enlarged."""
        return len(self.image) if isinstance(self.image, (list, torch.Tensor)) else 1

    @property
    def num_conditions(self) -> int:
        """How many prompts, or images to enlarge, there are: one prompt serves all images, one image all prompts."""
        texts = self.prompts if self.prompt is not None else self.prompt_embeds
        if texts is None or (len(texts) == 1 and self.num_given_images != self.num_images_per_prompt):
            return self.num_given_images
        return len(texts)

    @property
    def num_images(self) -> int:
        """Images to return."""
        return self.num_conditions * self.num_images_per_prompt

    @property
    def is_sweep(self) -> bool:
        """Whether several levels of noise are tried."""
        return isinstance(self.aug_level, list)

    def check(self, traits: UNetTraits) -> None:
        """Check the arguments against each other and the checkpoint.

        Raises:
            FieldError: If one does not fit.
        """
        self._check_text(traits)
        self._check_image(traits)
        if not is_count(self.num_images_per_prompt):
            raise FieldError(
                "num_images_per_prompt",
                f"`num_images_per_prompt` is {self.num_images_per_prompt}; expected an integer of at least 1.",
            )
        counts = sorted({1, self.num_conditions})
        for name in ("negative_prompt", "negative_prompt_embeds"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and len(value) not in counts:
                expected = " or ".join(map(str, counts))
                raise FieldError(name, f"`{name}` holds {len(value)}, but {expected} are needed.")
        if self.output_type not in OUTPUT_TYPES:
            raise FieldError("output_type", f"`output_type` is {self.output_type!r}; expected 'pil', 'np' or 'pt'.")
        if self.guide is not None and not callable(self.guide):
            raise FieldError("guide", f"`guide` must be a function, not {type(self.guide).__name__}.")
        check_generator(self.generator, self.num_images)
        check_candidates(self.num_candidates, self.scorer)
        if self.is_sweep and not callable(self.scorer):
            raise FieldError(
                "scorer",
                "A list of `aug_level` needs a `scorer` to choose by, such as llamagen_hf.clip.CLIPScorer.",
            )

    def _check_text(self, traits: UNetTraits) -> None:
        names = ("prompt", "prompt_embeds", "negative_prompt", "negative_prompt_embeds")
        given = [name for name in names if getattr(self, name) is not None]
        if traits.condition_dim is None:
            if given:
                raise FieldError(given[0], f"The U-Net of this checkpoint reads no text: leave out `{given[0]}`.")
            if self.guidance_scale not in (None, 1):
                raise FieldError("guidance_scale", "The U-Net of this checkpoint reads no text that could guide it.")
            return check_mask(self.prompt_attention_mask, None)
        for one, other in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
            if one in given and other in given:
                raise FieldError(one, f"Pass `{one}` or `{other}`, not both.")
        if not traits.upsamples and "prompt" not in given and "prompt_embeds" not in given:
            raise FieldError("prompt", "Pass `prompt` or `prompt_embeds`; found none of them.")
        for name in ("prompt", "negative_prompt"):
            if name in given:
                check_prompt(getattr(self, name), traits.reads_prompts, name)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            if name in given:
                mask = self.prompt_attention_mask if name == "prompt_embeds" else None
                check_states(getattr(self, name), traits.condition_length, traits.condition_dim, name, mask)
        check_mask(self.prompt_attention_mask, self.prompt_embeds)

    def _check_image(self, traits: UNetTraits) -> None:
        size, image = traits.image_size, self.image
        if not traits.upsamples:
            for name in ("image", "aug_level"):
                if getattr(self, name) is not None:
                    raise FieldError(name, f"This checkpoint enlarges no images: leave out `{name}`.")
            return
        accepted = f"expected square images of at most {size}x{size} pixels"
        if image is None:
            raise FieldError("image", f"This checkpoint enlarges images: pass them as `image`; {accepted}.")
        if isinstance(image, torch.Tensor):
            if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
                raise FieldError(
                    "image", f"`image` has shape {tuple(image.shape)}; expected (batch, 3, height, width)."
                )
            if not (0 <= image.min() and image.max() <= 1):
                raise FieldError("image", "`image` as a tensor must be in [0, 1].")
            sizes = [(image.shape[3], image.shape[2])]
        else:
            images = image if isinstance(image, list) else [image]
            if not images or not all(isinstance(each, Image.Image) for each in images):
                raise FieldError("image", "`image` must be a PIL image, a list of them or a tensor.")
            sizes = [each.size for each in images]
        for width, height in sizes:
            if width != height or width > size:
                raise FieldError("image", f"`image` has {width}x{height} pixels; {accepted}.")
        counts = sorted({1, self.num_conditions, self.num_images})
        if self.num_given_images not in counts:
            expected = " or ".join(map(str, counts))
            raise FieldError("image", f"`image` holds {self.num_given_images} images, but {expected} are needed.")
        if self.aug_level == []:
            raise FieldError("aug_level", "`aug_level` is an empty list; pass at least one level.")


def check_settings(settings: dict) -> None:
    """Check the settings of a call, none of them `None`.

    Raises:
        FieldError: If one is out of range.
    """

    def is_number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    expected = {
        "num_inference_steps": (
            lambda v: is_count(v) and v <= NUM_TIMESTEPS,
            f"an integer from 1 to {NUM_TIMESTEPS}",
        ),
        "guidance_scale": (lambda v: is_number(v) and v >= 0, "a number of at least 0 (1 turns it off)"),
        "aug_level": (lambda v: is_number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    }
    for name, value in settings.items():
        is_valid, what = expected[name]
        for each in value if isinstance(value, list) else [value]:
            if not is_valid(each):
                raise FieldError(name, f"`{name}` is {each}; expected {what}.")
