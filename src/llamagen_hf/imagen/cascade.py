"""`CascadePipeline`: a base draws small images, and an upsampler enlarges them."""

from collections.abc import Iterator
from functools import partial

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ..arguments import FieldError, is_count, plain
from ..conditioning.text import PromptLoss
from ..diffusion.denoising import Guide
from ..diffusion.inputs import DiffusionInputs
from ..diffusion.pipeline import PixelDiffusionPipeline
from ..diffusion.pipeline_output import PixelDiffusionOutput
from ..loading.checkpoint import CheckpointLoaderMixin
from ..loading.parts import PartsMixin
from ..outputs import GenerationStep, SavableOutput
from ..reproducibility import check_generator, image_generators, next_generators
from ..reranking import Scorer
from .cascade_output import CascadeOutput, with_upsampler, without_upsampler
from .foreign_base import ForeignBase


# The upsampler's settings, and what a call of the cascade calls them.
UPSAMPLER_SETTINGS = {
    "aug_level": "aug_level",
    "guidance_scale": "upsampler_guidance_scale",
    "num_inference_steps": "upsampler_num_inference_steps",
    "guide": "upsampler_guide",
}
BASE_PREFIX = "base_"


class CascadePipeline(PartsMixin, DiffusionPipeline):
    r"""Draws small images and enlarges them, as Imagen (arXiv 2205.11487) does.

    It has the loading, saving, device and offloading methods of any [`~diffusers.DiffusionPipeline`]; they reach both
    parts.

    Args:
        base ([`~diffusers.DiffusionPipeline`]):
            Draws the small images: [`AutoregressiveImagePipeline`], [`PixelDiffusionPipeline`], any pipeline of
            diffusers whose result has `.images`, or another cascade, as from 64 to 256 to 1024 pixels.
        upsampler ([`PixelDiffusionPipeline`]): Enlarges them.

    Example:

    ```python
    >>> from llamagen_hf import AutoregressiveImagePipeline, CascadePipeline, PixelDiffusionPipeline

    >>> base = AutoregressiveImagePipeline.from_pretrained()
    >>> cascade = CascadePipeline(base, PixelDiffusionPipeline.from_pretrained("runs/upsampler"))
    >>> cascade("a red apple", aug_level=0.1).save("apple.png")
    ```
    """

    def __init__(self, base: DiffusionPipeline, upsampler: PixelDiffusionPipeline):
        super().__init__()
        if not isinstance(base, DiffusionPipeline):
            raise ValueError(f"`base` must be a pipeline of diffusers or of this package, not {type(base).__name__}.")
        if not isinstance(upsampler, PixelDiffusionPipeline):
            raise ValueError(f"`upsampler` must be a PixelDiffusionPipeline, not {type(upsampler).__name__}.")
        if not upsampler.upsamples:
            raise ValueError("`upsampler` draws images from noise alone; expected a pipeline that enlarges images.")
        if isinstance(base, PixelDiffusionPipeline) and base.upsamples:
            raise ValueError("`base` enlarges images; expected a pipeline that draws them, such as a cascade.")
        self.register_modules(base=base, upsampler=upsampler)
        small, large = self._drawer.image_size, upsampler.image_size
        if small is not None and small >= large:
            raise ValueError(
                f"The base draws images of {small}x{small} pixels, but the upsampler makes {large}x{large} of smaller "
                "ones; they do not belong together."
            )

    @property
    def _drawer(self):
        """The base under the interface of this package's pipelines."""
        return self.base if isinstance(self.base, CheckpointLoaderMixin) else ForeignBase(self.base)

    @property
    def condition_kind(self) -> str:
        """What the base draws from: `"text"`, `"class"` or `"none"`."""
        return self._drawer.condition_kind

    @property
    def num_classes(self) -> int | None:
        """How many classes the base draws; `None` if it draws none."""
        return self._drawer.num_classes

    @property
    def upsamples(self) -> bool:
        """It draws images from a condition, and needs no small ones."""
        return False

    @property
    def image_size(self) -> int:
        """Side of the enlarged images, in pixels."""
        return self.upsampler.image_size

    @property
    def grid_size(self) -> int | None:
        """Side of the grid of codes that the base draws row by row; `None` if it draws no codes."""
        return self._drawer.grid_size

    @property
    def codebook_size(self) -> int | None:
        """How many codes the base draws from; `None` if it draws no codes."""
        return self._drawer.codebook_size

    @property
    def varies_images(self) -> bool:
        """Whether the base draws variations of images."""
        return self._drawer.varies_images

    @property
    def facts(self) -> dict:
        """What the parameters of all images say about the base, and below `"upsampler"` about the upsampler."""
        return with_upsampler(self._drawer.facts, self.upsampler.facts) | self._origin

    def class_names(self, class_labels: int | str | list[int | str]) -> list[str]:
        """The names of classes given by id or by name, as the base knows them."""
        return self._drawer.class_names(class_labels)

    def find_loss(self, prompt: str) -> PromptLoss | None:
        """What the base does not read of a prompt, see [`~llamagen_hf.conditioning.text.find_loss`]."""
        return self._drawer.find_loss(prompt)

    def sampling_settings(self, **given) -> dict:
        """The settings of a call by name; `None` stands for the default of the part that it belongs to."""
        base, upsampler = split_settings(given)
        base, upsampler = self._drawer.sampling_settings(**base), self.upsampler.sampling_settings(**upsampler)
        return joined_settings(base, upsampler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        aug_level: float | list[float] | None = None,
        upsampler_guidance_scale: float | None = None,
        upsampler_num_inference_steps: int | None = None,
        upsampler_guide: Guide | None = None,
        num_candidates: int = 1,
        scorer: Scorer | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **base_kwargs,
    ) -> CascadeOutput | tuple:
        r"""Draw images.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw, if the base draws from prompts. An upsampler that reads text gets it too.
            aug_level (`float` or `list[float]`, *optional*):
                How much noise is added to the small images before they are enlarged, in [0, 1]: at 0 each pixel
                counts, at 1 none. Of a list, all levels are tried with the same noise, and the best by `scorer` is
                kept. The defaults of this and the next two are the upsampler's.
            upsampler_guidance_scale (`float`, *optional*): Strength of guidance in the upsampler, if it reads text.
            upsampler_num_inference_steps (`int`, *optional*): Steps of the upsampler.
            upsampler_guide (`Callable`, *optional*):
                Adds to the score of the upsampler, see [`PixelDiffusionPipeline.__call__`]; `guide` to that of a base
                that takes one.
            num_candidates (`int`, *optional*, defaults to 1):
                Small images to draw for each image. Only the best is enlarged: by `scorer`, or by the base itself if
                it is a LlamaGen.
            scorer (`Callable`, *optional*):
                Takes a list of PIL images and one of prompts or class names, returns a number for each, higher is
                better. [`~llamagen_hf.clip.CLIPScorer`], for instance.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the draws. With one per image, an image does not depend on the rest of the batch: the base
                draws from it, and then it gives the seed of the upsampler's noise, which is in the parameters. By
                default each image gets one of its own.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`; `"np"` `(batch, height, width, 3)` or `"pt"` `(batch, 3, height, width)` in [0, 1].
            return_dict (`bool`, *optional*, defaults to `True`): Else a tuple of one element.
            base_kwargs: What else the base takes, such as `class_labels`, `guidance_scale` and
                `num_images_per_prompt`. If the base is a cascade, the settings of its upsampler begin with `base_`:
                `base_aug_level`.

        Returns:
            [`CascadeOutput`] or `tuple`: The images, prompt by prompt, and what made them.

        Raises:
            ValueError: If an argument does not fit.
        """
        call, enlarging = self._calls(
            prompt,
            aug_level=aug_level,
            upsampler_guidance_scale=upsampler_guidance_scale,
            upsampler_num_inference_steps=upsampler_num_inference_steps,
            upsampler_guide=upsampler_guide,
            num_candidates=num_candidates,
            scorer=scorer,
            generator=generator,
            output_type=output_type,
            **base_kwargs,
        )
        small = self._drawer(**call)
        output = self._joined(small, self.upsampler(**enlarging | self._enlarging(small, call)))
        return output if return_dict else (output.images,)

    def variation(self, image: Image.Image | list[Image.Image], **kwargs) -> CascadeOutput | tuple:
        """Draw images with the content of others, see [`PriorDecoderPipeline.variation`].

        Raises:
            ValueError: If the base draws no variations, or an argument does not fit.
        """
        return self(image_embeds=self.encode_image(image), **kwargs)

    def encode_image(self, image: Image.Image | list[Image.Image]) -> torch.Tensor:
        """What the base draws variations of images from, see [`PriorDecoderPipeline.encode_image`].

        Raises:
            ValueError: If it draws none.
        """
        if not self.varies_images:
            raise ValueError(f"The base, a {type(self.base).__name__}, draws no variations of images.")
        return self._drawer.encode_image(image)

    @torch.no_grad()
    def stream(self, prompt=None, *, preview_every: int | None = None, **kwargs) -> Iterator[GenerationStep]:
        """Draw images and show them on the way. Leaving the loop stops the work.

        Args:
            prompt, kwargs: As for [`__call__`], bar `return_dict` and callbacks.
            preview_every (`int`, *optional*):
                Steps of the base from one preview to the next. By default it decides. Upsamplers show each step.

        Yields:
            [`~llamagen_hf.outputs.GenerationStep`]: Previews at the size of the upsampler; those of the base are
            enlarged by interpolation. In the last step the images themselves. Steps of both parts are counted.

        Raises:
            ValueError: If an argument does not fit.
        """
        call, enlarging = self._calls(prompt, **kwargs)
        output_type, rest = enlarging["output_type"], self._num_steps(enlarging)
        if isinstance(self._drawer, ForeignBase):
            steps = [GenerationStep(1, 1, output=self._drawer(**call))]
        else:
            every = {} if preview_every is None else {"preview_every": preview_every}
            steps = self._drawer.stream(**call, **every)
        for step in steps:
            preview = partial(self._enlarged, step, output_type)
            yield GenerationStep(step.step, step.num_steps + rest, step.codes, preview)
        small, before = step.output, step.num_steps
        for step in self.upsampler.stream(**enlarging | self._enlarging(small, call)):
            output = None if step.output is None else self._joined(small, step.output)
            numbers = before + step.step, before + step.num_steps
            yield GenerationStep(*numbers, preview=step.preview, output=output)

    @torch.no_grad()
    def draw_pixels(self, prompt=None, **kwargs) -> torch.Tensor:
        """Draw images to measure: their pixels before they are clamped.

        Args:
            prompt, kwargs: As for [`__call__`], bar `return_dict` and callbacks.

        Returns:
            `torch.Tensor` of shape `(batch, 3, height, width)`: float32, nominally in [-1, 1].
        """
        call, enlarging = self._calls(prompt, **kwargs)
        small = self._drawer(**call)
        return self.upsampler.draw_pixels(**enlarging | self._enlarging(small, call))

    def redraw(self, parameters: dict, output_type: str = "pil") -> CascadeOutput:
        """Draw an image again from the parameters that made it.

        With the same checkpoint, device, dtype and library versions it is the same to the last bit.

        Args:
            parameters (`dict`): One of an output's `parameters`, or what
                [`~llamagen_hf.provenance.read_parameters`] reads.
            output_type (`str`, *optional*, defaults to `"pil"`): As for [`__call__`].

        Raises:
            ValueError: If they do not determine an image, or do not fit the parts.
        """
        base, upsampler = without_upsampler(parameters)
        if ("upsampler" in base) != isinstance(self.base, CascadePipeline):
            raise ValueError("The image was drawn by a cascade with another number of upsamplers.")
        small = self._drawer.redraw(base)
        large = self.upsampler.redraw(upsampler, image=small.images[0], output_type=output_type)
        return CascadeOutput(large.images, [parameters], small)

    def _calls(
        self, prompt=None, *, num_candidates=1, scorer=None, generator=None, output_type="pil", **settings
    ) -> tuple[dict, dict]:
        """The arguments of the base, and those of the upsampler that are known before there are small images.

        Raises:
            FieldError: If one does not fit the upsampler.
        """
        settings, enlarging = split_settings(settings)
        enlarging |= {"scorer": scorer, "output_type": output_type}
        call = {"prompt": prompt, "num_candidates": num_candidates, "scorer": scorer} | settings
        reads_text = self.upsampler.reads_text and prompt is not None
        placeholder = Image.new("RGB", (1, 1))
        try:
            inputs = DiffusionInputs(prompt=prompt if reads_text else None, image=placeholder, **enlarging)
            self.upsampler.check(inputs)
        except FieldError as error:
            name = UPSAMPLER_SETTINGS.get(error.field, error.field)
            raise FieldError(name, str(error).replace(f"`{error.field}`", f"`{name}`")) from error
        per_condition = plain(settings.get("num_images_per_prompt", 1))
        # What does not fit is for the base to say.
        count = len(conditions(call)) * (per_condition if is_count(per_condition) else 1)
        check_generator(generator, count)
        call["generator"] = image_generators(generator, count)
        return call, enlarging

    def _enlarging(self, small: SavableOutput, call: dict) -> dict:
        """The arguments of the upsampler that follow from the small images and from what they were drawn."""
        side, images = self.image_size, small.images
        if wrong := next((image.size for image in images if image.width != image.height or image.width >= side), None):
            raise ValueError(
                f"The base drew an image of {wrong[0]}x{wrong[1]} pixels, but the upsampler makes {side}x{side} of "
                "smaller square ones."
            )
        arguments = {"image": images, "generator": next_generators(call["generator"])}
        if call["prompt"] is not None and self.upsampler.reads_text:
            arguments["prompt"] = repeated(conditions(call), len(images))
        if call["scorer"] is not None:
            names = repeated(self._names(call), len(images))
            # The upsampler's own scorer knows no prompt if it reads none.
            arguments["scorer"] = lambda rows, _: call["scorer"](rows, repeated(names, len(rows)))
        return arguments

    def _names(self, call: dict) -> list[str | None]:
        """Prompts or names of the classes, one for each condition; `None` where there is neither."""
        if call.get("class_labels") is not None:
            return self.class_names(call["class_labels"])
        return conditions(call)

    def _num_steps(self, enlarging: dict) -> int:
        """Steps of the upsampler in a call."""
        given = {"num_inference_steps": enlarging.get("num_inference_steps")}
        return self.upsampler.sampling_settings(**given)["num_inference_steps"]

    def _enlarged(self, step: GenerationStep, output_type: str):
        """What the base shows at a step, at the size of the upsampler, in the output type."""
        side = self.image_size
        images = [image.resize((side, side), Image.Resampling.BICUBIC) for image in step.images]
        if output_type == "pil":
            return images
        array = VaeImageProcessor.pil_to_numpy(images)
        return array if output_type == "np" else VaeImageProcessor.numpy_to_pt(array)

    def _joined(self, small: SavableOutput, large: PixelDiffusionOutput) -> CascadeOutput:
        """The output of both parts."""
        pairs = zip(small.parameters, large.parameters, strict=True)
        parameters = [with_upsampler(first, second) | self._origin for first, second in pairs]
        return CascadeOutput(large.images, parameters, small, large.candidates)


def conditions(call: dict) -> list:
    """The prompts or classes of a call; `None` for each image or embedding without."""
    for name in ("prompt", "class_labels"):
        value = plain(call.get(name))
        if value is not None:
            return value if isinstance(value, list) else [value]
    given = [value for name in ("prompt_embeds", "image_embeds") if isinstance(value := call.get(name), torch.Tensor)]
    return [None] * (len(given[0]) if given else 1)


def repeated(values: list, count: int) -> list:
    """Each of the values as often as it takes to have `count` of them."""
    return [value for value in values for _ in range(count // len(values))]


def split_settings(settings: dict) -> tuple[dict, dict]:
    """The settings of the base and of the upsampler, each under the names that the part gives them."""
    upsampler = {own: settings[name] for own, name in UPSAMPLER_SETTINGS.items() if name in settings}
    base = {name: value for name, value in settings.items() if name not in UPSAMPLER_SETTINGS.values()}
    return {name.removeprefix(BASE_PREFIX): value for name, value in base.items()}, upsampler


def joined_settings(base: dict, upsampler: dict) -> dict:
    """The way back from [`split_settings`]."""
    taken = UPSAMPLER_SETTINGS.values()
    base = {BASE_PREFIX + name if name in taken else name: value for name, value in base.items()}
    return base | {UPSAMPLER_SETTINGS[name]: value for name, value in upsampler.items()}


# Saved pipelines name the module of a class. The package itself stays where it is, whatever moves within it.
CascadePipeline.__module__ = "llamagen_hf"
