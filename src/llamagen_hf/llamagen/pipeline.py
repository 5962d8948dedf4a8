"""`AutoregressiveImagePipeline`: a prompt or a class in, images out."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..arguments import FieldError, is_count, plain
from ..images.previews import PreviewSchedule
from ..loading.checkpoint import CheckpointLoaderMixin
from ..loading.lora import LoraLoaderMixin
from ..loading.offloading import OffloadingMixin, is_offloaded
from ..reproducibility import image_generators
from ..reranking import Candidate, Scorer, rank_candidates, score_images
from .callbacks import CodeCallbackMixin
from .configuration import LlamaGenConfig
from .decoding import CodeDecoder
from .encoding import EncodingMixin
from .inputs import GenerationInputs, PreparedInputs
from .likelihood import mean_log_likelihoods
from .modeling import LlamaGenForConditionalGeneration
from .noise import draw_noise_keys
from .pipeline_output import AutoregressiveImageOutput, GenerationStep
from .redraw import RedrawMixin
from .sampling import SAMPLING_DEFAULTS
from .vq_model import LlamaGenVQModel


class AutoregressiveImagePipeline(
    CodeCallbackMixin,
    EncodingMixin,
    LoraLoaderMixin,
    RedrawMixin,
    OffloadingMixin,
    CheckpointLoaderMixin,
    DiffusionPipeline,
):
    r"""Draws images with LlamaGen (arXiv 2406.06525): a Llama writes codes, a decoder turns them into pixels.

    It has the loading, saving, device and offloading methods of any [`~diffusers.DiffusionPipeline`].

    Args:
        vq_model ([`LlamaGenVQModel`], *optional*): Turns codes into images. Without it `output_type="codes"` works.
        transformer ([`LlamaGenForConditionalGeneration`], *optional*):
            Draws the codes. Without it images are encoded and codes decoded, and prompts encoded if the checkpoint
            that is loaded has one.
        text_encoder ([`~transformers.PreTrainedModel`], *optional*): Any encoder, for text-conditional checkpoints.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The text encoder's.
        sampling_defaults (`dict`, *optional*): What `__call__` uses where it is not told otherwise:
            `guidance_scale`, `temperature`, `top_k`, `top_p`. Saved with the checkpoint.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf import AutoregressiveImagePipeline

    >>> pipe = AutoregressiveImagePipeline.from_pretrained()  # the emoji checkpoint that ships with the package
    >>> image = pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0]
    >>> image.size
    (64, 64)
    ```
    """

    model_cpu_offload_seq = "text_encoder->transformer->vq_model"
    _optional_components = ["vq_model", "transformer", "text_encoder", "tokenizer"]
    # The configuration of a transformer that was left out.
    _generator_config: LlamaGenConfig | None = None

    def __init__(
        self,
        vq_model: LlamaGenVQModel | None = None,
        transformer: LlamaGenForConditionalGeneration | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        sampling_defaults: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            vq_model=vq_model, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        if vq_model and transformer and vq_model.config.num_vq_embeddings != transformer.config.vocab_size:
            raise ValueError(
                f"The transformer draws {transformer.config.vocab_size} codes, but the tokenizer has "
                f"{vq_model.config.num_vq_embeddings}; they do not belong together."
            )
        if text_encoder and transformer and text_encoder.config.hidden_size != transformer.config.condition_dim:
            raise ValueError(
                f"The text encoder's states are {text_encoder.config.hidden_size} wide, but the transformer takes "
                f"{transformer.config.condition_dim}; they do not belong together."
            )
        if unknown := set(sampling_defaults or {}) - set(SAMPLING_DEFAULTS):
            raise ValueError(f"`sampling_defaults` has {sorted(unknown)}; it may have {list(SAMPLING_DEFAULTS)}.")
        if sampling_defaults is not None:
            sampling_defaults = {name: plain(value) for name, value in sampling_defaults.items()}
        self.register_to_config(sampling_defaults=sampling_defaults)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vq_model.downsample_factor if vq_model else 1)
        self._decoder = CodeDecoder(transformer)

    def require(self, name: str, purpose: str):
        """The component of this name.

        Raises:
            ValueError: If it was left out; `purpose` says what it is needed for.
        """
        component = getattr(self, name)
        if component is None:
            raise ValueError(f"This pipeline has no {name}, {purpose}: load it as well.")
        return component

    @property
    def generator_config(self) -> LlamaGenConfig:
        """The transformer's configuration, also where the checkpoint was loaded with `transformer=None`."""
        if self.transformer is None and self._generator_config is not None:
            return self._generator_config
        return self.require("transformer", "whose configuration is needed here").config

    def _read_left_out(self, folder: Path) -> None:
        if self.transformer is None and (folder / "transformer").is_dir():
            # Prompts are encoded to its length, and images to its grid.
            self._generator_config = LlamaGenConfig.from_pretrained(folder / "transformer")

    @property
    def condition_kind(self) -> Literal["text", "class"]:
        """What the checkpoint draws from: prompts or classes."""
        return self.generator_config.conditioning

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; `None` for a text-conditional checkpoint."""
        return self.generator_config.num_classes if self.condition_kind == "class" else None

    @property
    def upsamples(self) -> bool:
        """It draws images, and enlarges none."""
        return False

    @property
    def grid_size(self) -> int:
        """Side of the grid of codes, which are drawn row by row."""
        return self.generator_config.grid_size

    @property
    def codebook_size(self) -> int:
        """How many codes there are to draw from."""
        return self.generator_config.vocab_size

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        vq_model = self.require("vq_model", "which says how large images are")
        if self.transformer is None and self._generator_config is None:
            return vq_model.config.sample_size
        return self.generator_config.grid_size * vq_model.downsample_factor

    def sampling_settings(self, **given: float | None) -> dict[str, float]:
        """The settings of a call by name; `None` stands for the default of the checkpoint, or else of the library."""
        settings = SAMPLING_DEFAULTS | (self.config.sampling_defaults or {})
        return settings | {name: plain(value) for name, value in given.items() if value is not None}

    def compile_step(self, **kwargs) -> None:
        """Compile the step that draws one code, see [`~llamagen_hf.llamagen.decoding.CodeDecoder.compile`].

        Call it last, when weights, dtype and device are set. The first image then takes a minute or so to compile.
        """
        if is_offloaded(self.require("transformer", "which draws")):
            raise ValueError("The weights are offloaded, which a compiled step can't be: use one or the other.")
        self.decoder.compile(**kwargs)

    @property
    def is_compiled(self) -> bool:
        """Whether [`compile_step`] was called, after which adapters can't be changed."""
        return self.transformer is not None and self.decoder.is_compiled

    @property
    def decoder(self) -> CodeDecoder:
        """The token loop around the current `transformer`."""
        if self._decoder.model is not self.transformer:
            self._decoder = CodeDecoder(self.transformer)
        return self._decoder

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: int = -1,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["codes"],  # noqa: B006 (diffusers' signature, never changed)
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | list[Image.Image] | torch.Tensor | None = None,
        keep_rows: int | None = None,
        prefix_codes: torch.LongTensor | None = None,
        num_candidates: int = 1,
        scorer: Scorer | None = None,
        decoding_window: int | Literal["auto"] = 1,
    ) -> AutoregressiveImageOutput | tuple:
        r"""Draw images.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw, for text-conditional checkpoints.
            class_labels (`int`, `str` or a list of them, *optional*):
                Classes by id or name instead. A string of digits is an id if no class is called so.
            guidance_scale (`float`, *optional*):
                Strength of classifier-free guidance on the logits, at least 0. 1 turns it off and halves the work.
                The checkpoint's `sampling_defaults` apply to this and the next three, then 4.0, 1.0, 0 and 1.0.
            guidance_interval (`int`, *optional*, defaults to -1):
                n guides the first n + 2 codes only, as the released `cfg_interval` does; -1 guides all.
            temperature (`float`, *optional*): Divides the logits, at least 0; 0 takes the likeliest code.
            top_k (`int`, *optional*): Number of codes to draw from; 0 means all.
            top_p (`float`, *optional*): Probability mass to draw from, in [0, 1]; 1 means all.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images for each prompt or class.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the draws. With one per image, an image does not depend on the rest of the batch. By default
                each image gets one of its own, whose seed is in the output's `parameters`.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Text states instead of `prompt`, padded on the left, see [`EncodingMixin.encode_prompt`].
            prompt_attention_mask (`torch.Tensor` of shape `(batch, condition_length)`, *optional*):
                1 for words, 0 for padding; all words by default.
            image (`PIL.Image.Image`, `list[PIL.Image.Image]` or `torch.Tensor`, *optional*):
                An image to complete, or one for each prompt or image, see [`EncodingMixin.encode_image`].
            keep_rows (`int`, *optional*): With `image`, rows of codes to keep, below `grid_size`; others are drawn.
            prefix_codes (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                Instead of `image`, the first codes themselves, in raster order.
            num_candidates (`int`, *optional*, defaults to 1):
                Images to draw for each, all from its generator, to return the best. The first is drawn with 1, too.
            scorer (`Callable`, *optional*):
                Takes a list of PIL images and one of prompts or class names, returns a number for each, higher is
                better. By default the generator's own [`~llamagen_hf.llamagen.likelihood.mean_log_likelihoods`].
            decoding_window (`int` or `"auto"`, *optional*, defaults to 1):
                Codes of an image that a step may draw; `"auto"` takes the fastest here, measured once. In float32 the
                image is the same, up to rounding; see [`~llamagen_hf.llamagen.windows.CodeWindows`].
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`; `"np"` `(batch, height, width, 3)` or `"pt"` `(batch, 3, height, width)` in [0, 1]; or
                `"codes"`, the grid itself, `(batch, grid_size, grid_size)` long.
            return_dict (`bool`, *optional*, defaults to `True`): Else a tuple of one element.
            callback_on_step_end (`Callable`, *optional*):
                Called after each code as `callback(pipe, step, index, {"codes": codes})` with the `(batch, index + 1)`
                codes so far; `step` counts those that this call drew. A dict with changed `"codes"` may be returned:
                the last column changes what follows. `pipe._guidance_scale` may be set, to 0 for no more guidance, and
                `pipe._interrupt` to `True`: the output then holds the `(batch, n)` codes so far, and previews of them.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["codes"]`):
                What the callback's dict holds: `"codes"`, `"prompt_embeds"`. The latter, in class mode the input ids
                of the classes `(batch, 1)`, were read before the first code, so changing them changes nothing. A
                [`~diffusers.callbacks.PipelineCallback`] brings its own.
            height, width (`int`, *optional*): Only [`image_size`], the one size that a checkpoint draws.

        Returns:
            [`AutoregressiveImageOutput`] or `tuple`: The images, prompt by prompt, and what made them.

        Raises:
            ValueError: If an argument does not fit.
        """
        inputs = GenerationInputs(
            prompt=prompt,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            image=image,
            keep_rows=keep_rows,
            prefix_codes=prefix_codes,
            num_candidates=num_candidates,
            scorer=scorer,
            decoding_window=decoding_window,
            output_type=output_type,
            height=height,
            width=width,
        )
        prepared = self.prepare(inputs)
        codes = self.generate_codes(prepared.arguments, callback_on_step_end, callback_on_step_end_tensor_inputs)
        output = self.finish(prepared, codes)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images,)

    def prepare(self, inputs: GenerationInputs) -> PreparedInputs:
        """Check the arguments of a call and prepare what the token loop draws from.

        Raises:
            ValueError: If a component is missing, or an argument does not fit.
        """
        config, device = self.require("transformer", "which draws").config, self._execution_device
        needs_pixels = (inputs.image, inputs.height, inputs.width, inputs.scorer) != (None,) * 4
        if inputs.output_type != "codes" or needs_pixels:
            self.require("vq_model", "without which it draws only output_type='codes'")
        prepared = inputs.prepare(
            config,
            image_size=self.image_size if self.vq_model is not None else None,
            device=device,
            dtype=self.transformer.dtype,
            sampling_defaults=self.sampling_settings(),
            encode_prompt=self.encode_prompt if self.text_encoder is not None and self.tokenizer is not None else None,
            encode_image=self.encode_image,
        )
        streams = inputs.num_drawn if prepared.params.guidance_scale == 1 else 2 * inputs.num_drawn
        prepared.decoding_window = self.decoder.resolve_window(inputs.decoding_window, streams, device)
        generators = image_generators(inputs.generator, inputs.num_images, inputs.num_candidates)
        prepared.parameters = prepared.describe(generators, self.facts)
        prepared.tensors["noise_keys"] = draw_noise_keys(inputs.num_drawn, generators, device)
        return prepared

    def finish(self, prepared: PreparedInputs, codes: torch.LongTensor) -> AutoregressiveImageOutput:
        """Turn the codes `(batch, n)` that were drawn into images, and choose among candidates."""
        inputs, parameters, grid_size = prepared.inputs, prepared.parameters, self.transformer.config.grid_size
        decode = self.decode_codes
        if codes.shape[1] == grid_size**2:
            codes = codes.unflatten(1, (grid_size, grid_size))
        else:  # interrupted
            parameters = [each | {"interrupted_after": codes.shape[1]} for each in parameters]
            decode = self.preview
        images = codes if inputs.output_type == "codes" else decode(codes, inputs.output_type)
        if inputs.num_candidates == 1:
            return AutoregressiveImageOutput(images, codes, parameters)

        if inputs.scorer is None:
            scores = mean_log_likelihoods(self.transformer, codes.flatten(1), **prepared.tensors)
        else:
            scored = images if inputs.output_type == "pil" else decode(codes)
            scores = score_images(inputs.scorer, scored, prepared.names)
        candidates = [Candidate(*row) for row in zip(images, scores, parameters, codes, strict=True)]
        ranked = rank_candidates(scores, inputs.num_candidates)
        best = [rank[0] for rank in ranked]
        return AutoregressiveImageOutput(
            images=[images[i] for i in best] if isinstance(images, list) else images[best],
            codes=codes[best],
            parameters=[parameters[i] for i in best],
            candidates=[[candidates[i] for i in rank] for rank in ranked],
        )

    @torch.no_grad()
    def stream(
        self, prompt=None, class_labels=None, *, preview_every: int | None = None, **kwargs
    ) -> Iterator[GenerationStep]:
        """Draw images and show them on the way. Leaving the loop stops the work.

        Args:
            prompt, class_labels, kwargs: As for [`__call__`], bar `return_dict` and callbacks.
            preview_every (`int`, *optional*):
                Codes from one preview to the next. By default there is one at the end of a row, as long as previews
                take less than a tenth of the time.

        Yields:
            [`GenerationStep`]: The codes so far and their previews; what is not drawn yet is a light
            grey. In the last step the images themselves. With `num_candidates`, previews are those of all candidates.

        Raises:
            ValueError: If an argument does not fit.

        Example:

        ```python
        >>> for step in pipe.stream("a red apple", preview_every=8):
        ...     step.images[0].save("apple.png")
        ```
        """
        preview_every = plain(preview_every)
        if preview_every is not None and not is_count(preview_every):
            raise FieldError(
                "preview_every", f"`preview_every` is {preview_every}; expected an integer of at least 1."
            )
        prepared = self.prepare(GenerationInputs(prompt=prompt, class_labels=class_labels, **kwargs))
        config = self.transformer.config
        schedule = PreviewSchedule(preview_every, config.grid_size)
        try:
            for codes in self.decoder.stream(**prepared.arguments):
                if codes.shape[1] < config.num_codes and schedule.is_due(codes.shape[1]):
                    so_far = codes.clone()
                    preview = schedule.measured()(partial(self.preview, so_far, prepared.inputs.output_type))
                    yield GenerationStep(codes.shape[1], config.num_codes, so_far, preview)
            output = self.finish(prepared, codes)
            yield GenerationStep(codes.shape[1], config.num_codes, codes, output=output)
        finally:  # also when the loop is left
            self.maybe_free_model_hooks()


# Saved pipelines name the module of a class. The package itself stays where it is, whatever moves within it.
AutoregressiveImagePipeline.__module__ = "llamagen_hf"
