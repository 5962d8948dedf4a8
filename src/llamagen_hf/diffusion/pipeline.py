"""`PixelDiffusionPipeline`: a prompt, a small image or both in, images out."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import FieldError, is_count, plain
from ..callbacks import CallbackMixin
from ..loading.checkpoint import CheckpointLoaderMixin
from ..loading.lora import LoraLoaderMixin
from ..loading.offloading import OffloadingMixin
from ..outputs import GenerationStep
from ..reranking import Candidate, Scorer, rank_candidates, score_images
from .denoising import DenoisingStep, Guide, denoise
from .encoding import CONVENTIONS, EncodingMixin
from .inputs import DiffusionInputs, check_settings
from .pipeline_output import PixelDiffusionOutput, RedrawMixin
from .preparation import PreparationMixin, PreparedInputs
from .schedules import check_scheduler
from .unet import condition_dim, image_size, learns_variance, upsamples


# Where neither the call nor the checkpoint says otherwise.
SAMPLING_DEFAULTS = {"num_inference_steps": 20, "guidance_scale": 4.0, "aug_level": 0.0}
# DeepFloyd IF's pipelines, with the settings of theirs that differ.
DEEPFLOYD_DEFAULTS = {
    "IFPipeline": {"num_inference_steps": 100, "guidance_scale": 7.0},
    "IFSuperResolutionPipeline": {"num_inference_steps": 50, "guidance_scale": 4.0, "aug_level": 0.25},
}


class PixelDiffusionPipeline(
    CallbackMixin,
    EncodingMixin,
    LoraLoaderMixin,
    PreparationMixin,
    RedrawMixin,
    OffloadingMixin,
    CheckpointLoaderMixin,
    DiffusionPipeline,
):
    r"""Draws or enlarges images by diffusion in pixels, as Imagen (arXiv 2205.11487) does.

    What it does is read off its U-Net: one with twice the input channels enlarges images, and one without
    cross-attention reads no text. The folders of DeepFloyd IF's first two stages load too.

    It has the loading, saving, device and offloading methods of any [`~diffusers.DiffusionPipeline`].

    Args:
        unet ([`~diffusers.UNet2DConditionModel`]): See [`~llamagen_hf.diffusion.unet.efficient_unet`].
        scheduler ([`~diffusers.SchedulerMixin`]):
            Any with the noise schedule of the training, such as
            [`~llamagen_hf.diffusion.schedules.sampling_scheduler`]. Its thresholding is changed by
            [`~llamagen_hf.diffusion.schedules.with_thresholding`].
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Any encoder, for a U-Net that reads text.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The text encoder's.
        condition_length (`int`, *optional*, defaults to 77): Positions of the text states; 1 for an embedding.
        convention (`str`, *optional*, defaults to `"own"`):
            `"own"` or `"deepfloyd"`: how prompts are cleaned and padded, and images enlarged.
        sampling_defaults (`dict`, *optional*): What `__call__` uses where it is not told otherwise:
            `num_inference_steps`, `guidance_scale`, `aug_level`. Saved with the checkpoint.

    Example:

    ```python
    >>> from llamagen_hf import PixelDiffusionPipeline

    >>> upsampler = PixelDiffusionPipeline.from_pretrained("runs/upsampler")
    >>> large = upsampler("a red apple", image=small, aug_level=0.1).images[0]
    ```
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["sample", "prompt_embeds"]
    _lora_loadable_modules = ["unet"]
    varies_images = False  # it draws no variations of images

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        condition_length: int = 77,
        convention: str = "own",
        sampling_defaults: dict | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        dim = condition_dim(unet)
        if text_encoder is not None and text_encoder.config.hidden_size != dim:
            takes = "reads no text" if dim is None else f"takes {dim}"
            raise ValueError(
                f"The text encoder's states are {text_encoder.config.hidden_size} wide, but the U-Net {takes}; they "
                "do not belong together."
            )
        if convention not in CONVENTIONS:
            raise ValueError(f"`convention` is {convention!r}; expected {' or '.join(map(repr, CONVENTIONS))}.")
        check_scheduler(scheduler, learns_variance(unet))
        self._trained_scheduler = scheduler
        self.register_to_config(condition_length=condition_length, convention=convention, sampling_defaults=None)
        known = self.sampling_settings()
        if unknown := set(sampling_defaults or {}) - set(known):
            raise ValueError(f"`sampling_defaults` has {sorted(unknown)}; it may have {list(known)}.")
        if sampling_defaults is not None:
            sampling_defaults = {name: plain(value) for name, value in sampling_defaults.items()}
            check_settings(sampling_defaults)
            self.register_to_config(sampling_defaults=sampling_defaults)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def _missing_settings(cls, folder: Path) -> dict:
        name = json.loads((folder / cls.config_name).read_text(encoding="utf-8")).get("_class_name")
        if name in DEEPFLOYD_DEFAULTS:
            return {"convention": "deepfloyd", "sampling_defaults": DEEPFLOYD_DEFAULTS[name]}
        if name != cls.__name__:
            raise OSError(
                f"{folder.name!r} holds another pipeline, of class {name!r}; expected {cls.__name__} or one of "
                f"DeepFloyd IF: {', '.join(DEEPFLOYD_DEFAULTS)}."
            )
        return {}

    @property
    def upsamples(self) -> bool:
        """Whether it enlarges images, and not draws them from noise alone."""
        return upsamples(self.unet)

    @property
    def reads_text(self) -> bool:
        """Whether it reads prompts, or text states."""
        return condition_dim(self.unet) is not None

    @property
    def condition_kind(self) -> Literal["text", "image", "none"]:
        """What it draws from: prompts, with or without images; images alone; or nothing but noise."""
        return "text" if self.reads_text else "image" if self.upsamples else "none"

    @property
    def num_classes(self) -> None:
        """There are no classes."""
        return None

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return image_size(self.unet)

    @property
    def grid_size(self) -> None:
        """There is no grid of codes that is drawn row by row."""
        return None

    codebook_size = grid_size

    def sampling_settings(self, **given) -> dict[str, float]:
        """The settings of a call by name; `None` stands for the default of the checkpoint, or else of the library.

        `guidance_scale` is there if the U-Net reads text, and `aug_level` if it upsamples.
        """
        here = {"num_inference_steps": True, "guidance_scale": self.reads_text, "aug_level": self.upsamples}
        settings = {name: value for name, value in SAMPLING_DEFAULTS.items() if here[name]}
        settings |= self.config.sampling_defaults or {}
        return settings | {name: plain(value) for name, value in given.items() if value is not None}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Image.Image | list[Image.Image] | torch.Tensor | None = None,
        aug_level: float | list[float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        guide: Guide | None = None,
        num_candidates: int = 1,
        scorer: Scorer | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["sample"],  # noqa: B006 (diffusers' signature, never changed)
    ) -> PixelDiffusionOutput | tuple:
        r"""Draw or enlarge images.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to draw, if the U-Net reads text. An upsampler also works without. One prompt serves all images.
            image (`PIL.Image.Image`, `list[PIL.Image.Image]` or `torch.Tensor`, *optional*):
                What to enlarge, if the U-Net upsamples: square and not larger than [`image_size`], one for all
                prompts, for each prompt or for each image. Tensors are `(batch, 3, height, width)` in [0, 1].
            aug_level (`float` or `list[float]`, *optional*):
                How much noise is added to `image`, in [0, 1]: at 0 each of its pixels counts, at 1 none. Of a list,
                all levels are tried with the same noise, and the best by `scorer` is kept; its level is in the
                output's `parameters`. The checkpoint's `sampling_defaults` apply to this, `num_inference_steps` and
                `guidance_scale`, then 0.0, 20 and 4.0.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to `""`): What guidance leads away from.
            num_inference_steps (`int`, *optional*): Steps from noise to image, from 1 to 1000.
            guidance_scale (`float`, *optional*):
                Strength of classifier-free guidance, at least 0. 1 turns it off and halves the work.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images for each prompt or image.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise. With one per image, an image does not depend on the rest of the batch. By default
                each image gets one of its own, whose seed is in the output's `parameters`.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Text states instead of `prompt`, see [`~llamagen_hf.diffusion.encoding.EncodingMixin.encode_prompt`],
                or an embedding as the only position.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, condition_length)`, *optional*):
                1 for words, 0 for padding, whose states change nothing; all words by default.
            negative_prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                States instead of `negative_prompt`, zero where there is padding. Without a text encoder, guidance by
                default leads away from zeros.
            guide (`Callable`, *optional*):
                Adds to the score: [`~llamagen_hf.diffusion.guides.ClassifierGuide`],
                [`~llamagen_hf.diffusion.guides.CLIPGuide`], or a function as for
                [`~llamagen_hf.diffusion.denoising.denoise`].
            num_candidates (`int`, *optional*, defaults to 1):
                Images to draw for each image, of which the best by `scorer` is returned. The first is the one that
                would be drawn without; all come from the image's generator.
            scorer (`Callable`, *optional*):
                Takes a list of PIL images and one of prompts, returns a number for each, higher is better.
                [`~llamagen_hf.clip.CLIPScorer`], for instance.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`; `"np"` `(batch, height, width, 3)` or `"pt"` `(batch, 3, height, width)` in [0, 1].
            return_dict (`bool`, *optional*, defaults to `True`): Else a tuple of one element.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, {"sample": sample})` with the `(batch, 3,
                height, width)` noisy images, candidates included. A dict with a changed `"sample"` may be returned.
                `pipe._guidance_scale` may be set, to 0 for no more guidance, and `pipe._interrupt` to `True`: the
                output then holds the images as they are predicted at this step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["sample"]`):
                What the callback's dict holds: `"sample"`, `"prompt_embeds"`. Changing the latter changes nothing. A
                [`~diffusers.callbacks.PipelineCallback`] brings its own.

        Returns:
            [`PixelDiffusionOutput`] or `tuple`: The images, prompt by prompt, and what made them.

        Raises:
            ValueError: If an argument does not fit.
        """
        inputs = DiffusionInputs(
            prompt=prompt,
            image=image,
            aug_level=aug_level,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            guide=guide,
            num_candidates=num_candidates,
            scorer=scorer,
            output_type=output_type,
        )
        wanted = self._wanted_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs)
        prepared = self.prepare(inputs)
        output = self.finish(prepared, *self._generate(prepared, callback_on_step_end, wanted))
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images,)

    @torch.no_grad()
    def stream(self, prompt=None, image=None, *, preview_every: int = 1, **kwargs) -> Iterator[GenerationStep]:
        """Draw images and show them on the way. Leaving the loop stops the work.

        Args:
            prompt, image, kwargs: As for [`__call__`], bar `return_dict` and callbacks.
            preview_every (`int`, *optional*, defaults to 1): Steps from one preview to the next.

        Yields:
            [`~llamagen_hf.outputs.GenerationStep`]: The images as they are predicted at a step. In the last one the
            images themselves. With candidates, previews are those of all.

        Raises:
            ValueError: If an argument does not fit.
        """
        preview_every = plain(preview_every)
        if not is_count(preview_every):
            raise FieldError(
                "preview_every", f"`preview_every` is {preview_every}; expected an integer of at least 1."
            )
        prepared = self.prepare(DiffusionInputs(prompt=prompt, image=image, **kwargs))
        try:
            for step in self._denoise(prepared):
                done = step.index + 1
                if done < step.num_steps and done % preview_every == 0:
                    preview = partial(self._preview, step, prepared.inputs.output_type)
                    yield GenerationStep(done, step.num_steps, preview=preview)
            output = self.finish(prepared, step.sample)
            yield GenerationStep(done, step.num_steps, output=output)
        finally:  # also when the loop is left
            self.maybe_free_model_hooks()

    @torch.no_grad()
    def draw_pixels(self, **kwargs) -> torch.Tensor:
        """Draw images to measure: their pixels before they are clamped.

        Args:
            kwargs: As for [`__call__`], bar `return_dict` and callbacks.

        Returns:
            `torch.Tensor` of shape `(batch, 3, height, width)`: float32, nominally in [-1, 1].
        """
        prepared = self.prepare(DiffusionInputs(**kwargs))
        pixels, _ = self._generate(prepared)
        best = [rank[0] for rank in self._rank(prepared, pixels)[1]]
        self.maybe_free_model_hooks()
        return pixels[best]

    def _denoise(self, prepared: PreparedInputs) -> Iterator[DenoisingStep]:
        return denoise(
            self.unet,
            self.scheduler,
            prepared.noise,
            **prepared.settings,
            **prepared.condition,
            corrects_guess=self.convention.corrects_guess,
            guide=prepared.inputs.guide,
            generators=prepared.generators,
        )

    def _generate(
        self, prepared: PreparedInputs, callback: Callable | None = None, wanted: list[str] | None = None
    ) -> tuple[torch.Tensor, int | None]:
        """The pixels `(rows, 3, height, width)`, and after how many steps they were interrupted, if they were."""
        scale, num_steps = prepared.settings.get("guidance_scale"), prepared.settings["num_inference_steps"]
        self._guidance_scale, self._num_timesteps, self._interrupt = scale, num_steps, False
        with self.progress_bar(total=num_steps) as progress_bar:
            for step in self._denoise(prepared):
                progress_bar.update()
                if callback is not None:
                    self._guidance_scale = step.guidance_scale  # of this call, whatever runs beside it
                    tensors = {"sample": step.sample, "prompt_embeds": prepared.condition.get("states")}
                    given = {name: tensors[name] for name in wanted}
                    changed = (callback(self, step.index, step.timestep, given) or {}).get("sample")
                    if changed is not None:
                        if changed.shape != step.sample.shape:
                            raise FieldError(
                                "sample",
                                f"The callback returned `sample` of shape {tuple(changed.shape)}; expected "
                                f"{tuple(step.sample.shape)}.",
                            )
                        step.sample = changed.to(step.sample)
                    if self._guidance_scale != step.guidance_scale:
                        step.guidance_scale = self._guidance_scale or 1.0  # diffusers' callbacks turn it off by 0
                        check_settings({"guidance_scale": step.guidance_scale})
                if self.interrupt and step.index + 1 < step.num_steps:
                    return step.predicted, step.index + 1
        return step.sample, None

    def finish(
        self, prepared: PreparedInputs, pixels: torch.Tensor, interrupted_after: int | None = None
    ) -> PixelDiffusionOutput:
        """Turn pixels `(rows, 3, height, width)` into images, and choose among candidates."""
        images, parameters = self._convert(pixels, prepared.inputs.output_type), prepared.parameters
        if interrupted_after is not None:
            parameters = [each | {"interrupted_after": interrupted_after} for each in parameters]
        if prepared.group_size == 1:
            return PixelDiffusionOutput(images, parameters)
        scores, ranked = self._rank(prepared, pixels)
        candidates = [Candidate(*row) for row in zip(images, scores, parameters, strict=True)]
        best = [rank[0] for rank in ranked]
        return PixelDiffusionOutput(
            images=[images[i] for i in best] if isinstance(images, list) else images[best],
            parameters=[parameters[i] for i in best],
            candidates=[[candidates[i] for i in rank] for rank in ranked],
        )

    def _rank(self, prepared: PreparedInputs, pixels: torch.Tensor) -> tuple[list[float], list[list[int]]]:
        """The score of each row, and for each image its rows, best first."""
        if prepared.group_size == 1:
            return [], [[row] for row in range(len(pixels))]
        scores = score_images(prepared.inputs.scorer, self._convert(pixels, "pil"), prepared.names)
        return scores, rank_candidates(scores, prepared.group_size)

    def _preview(self, step: DenoisingStep, output_type: str):
        """The images as they are predicted at a step."""
        return self._convert(step.predicted, output_type)

    def _convert(self, pixels: torch.Tensor, output_type: str):
        return self.image_processor.postprocess(pixels, output_type=output_type)


# Saved pipelines name the module of a class. The package itself stays where it is, whatever moves within it.
PixelDiffusionPipeline.__module__ = "llamagen_hf"
