"""`EmbeddingPriorPipeline`: a prompt in, CLIP embeddings of images that fit it out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, PriorTransformer, SchedulerMixin
from transformers import (
    BaseImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)

from ..arguments import FieldError, plain
from ..callbacks import CallbackMixin
from ..diffusion.schedules import check_scheduler
from ..llamagen.decoding import CodeDecoder
from ..llamagen.modeling import LlamaGenForConditionalGeneration
from ..llamagen.noise import draw_noise_keys
from ..loading.checkpoint import CheckpointLoaderMixin
from ..loading.offloading import OffloadingMixin
from ..provenance import describe
from ..reproducibility import image_generators, told_apart
from .clip_encoders import CLIPEncodingMixin, TextCondition, check_finite
from .embedding_codes import EmbeddingQuantizer
from .embedding_denoising import EmbeddingStep, denoise_embeddings
from .prior_inputs import AUTOREGRESSIVE_DEFAULTS, DIFFUSION_DEFAULTS, PriorInputs, check_prior_settings
from .prior_output import EmbeddingPriorOutput, PriorRedrawMixin


@dataclass
class PreparedPrior:
    """What a prior draws from, a row for each embedding to draw.

    Args:
        inputs ([`~llamagen_hf.unclip.prior_inputs.PriorInputs`]): The arguments of the call.
        settings (`dict`): The settings, none of them `None`.
        text ([`~llamagen_hf.unclip.clip_encoders.TextCondition`]): The prompts.
        null_text ([`~llamagen_hf.unclip.clip_encoders.TextCondition`], *optional*): What guidance leads away from.
        randomness (`torch.Tensor`): Noise `(rows, dim)`, or of an autoregressive prior the noise's keys `(rows,)`.
        generators (`list[torch.Generator]`): For noise on the way.
        parameters (`list[dict]`): What makes each embedding.
    """

    inputs: PriorInputs
    settings: dict
    text: TextCondition
    null_text: TextCondition | None
    randomness: torch.Tensor
    generators: list[torch.Generator]
    parameters: list[dict]


class EmbeddingPriorPipeline(
    CallbackMixin, CLIPEncodingMixin, PriorRedrawMixin, OffloadingMixin, CheckpointLoaderMixin, DiffusionPipeline
):
    r"""DALL-E 2's prior (arXiv 2204.06125): draws the CLIP embedding of an image that a caption describes.

    There are two kinds. A diffusion prior turns noise into standardised embeddings, and needs `scheduler`. An
    autoregressive prior writes the embedding code by code, and needs `quantizer`. Embeddings have length 1.

    Args:
        prior ([`~diffusers.PriorTransformer`] or [`LlamaGenForConditionalGeneration`]): What draws.
        text_encoder ([`~transformers.CLIPTextModelWithProjection`]): CLIP's text encoder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The text encoder's.
        scheduler ([`~diffusers.SchedulerMixin`], *optional*):
            Of a diffusion prior, see [`~llamagen_hf.unclip.embedding_denoising.prior_scheduler`].
        quantizer ([`EmbeddingQuantizer`], *optional*): Of an autoregressive prior.
        image_encoder ([`~transformers.CLIPVisionModelWithProjection`], *optional*):
            CLIP's image encoder. `encode_image` needs it, drawing does not.
        image_processor ([`~transformers.BaseImageProcessor`], *optional*): The image encoder's.
        sampling_defaults (`dict`, *optional*): What `__call__` uses where it is not told otherwise. Saved with the
            checkpoint.

    Example:

    ```python
    >>> from llamagen_hf import EmbeddingPriorPipeline

    >>> prior = EmbeddingPriorPipeline.from_pretrained("runs/prior")
    >>> embeds = prior("a red apple").image_embeds
    ```
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->prior"
    _exclude_from_cpu_offload = ["prior"]  # mean and deviation are its own parameters, and read outside its call
    _optional_components = ["scheduler", "quantizer", "image_encoder", "image_processor"]
    _callback_tensor_inputs = ["latents", "codes"]

    def __init__(
        self,
        prior: PriorTransformer | LlamaGenForConditionalGeneration,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin | None = None,
        quantizer: EmbeddingQuantizer | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        image_processor: BaseImageProcessor | None = None,
        sampling_defaults: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            prior=prior,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
            quantizer=quantizer,
            image_encoder=image_encoder,
            image_processor=image_processor,
        )
        self._check_components()
        self._trained_scheduler = scheduler
        self.register_to_config(sampling_defaults=None)
        if unknown := set(sampling_defaults or {}) - set(self.sampling_settings()):
            raise ValueError(
                f"`sampling_defaults` has {sorted(unknown)}; it may have {list(self.sampling_settings())}."
            )
        if sampling_defaults is not None:
            sampling_defaults = {name: plain(value) for name, value in sampling_defaults.items()}
            check_prior_settings(self.sampling_settings() | sampling_defaults)
            self.register_to_config(sampling_defaults=sampling_defaults)

    def _check_components(self) -> None:
        given = "quantizer" if self.quantizer is not None else "scheduler" if self.scheduler is not None else None
        needed = "quantizer" if self.is_autoregressive else "scheduler"
        if given != needed or (self.quantizer is not None and self.scheduler is not None):
            kind = "autoregressive" if self.is_autoregressive else "diffusion"
            other = "scheduler" if self.is_autoregressive else "quantizer"
            raise ValueError(f"This prior is of the {kind} kind: it needs a {needed}, and takes no {other}.")
        widths = {"text encoder": self.text_encoder.config.projection_dim}
        if self.image_encoder is not None:
            widths["image encoder"] = self.image_encoder.config.projection_dim
        if self.quantizer is not None:
            widths["quantizer"] = self.quantizer.config.embedding_dim
        for name, width in widths.items():
            if width != self.embedding_dim:
                raise ValueError(
                    f"The prior's embeddings are {self.embedding_dim} wide, but those of the {name} {width}; they do "
                    "not belong together."
                )
        if self.quantizer is not None:
            own = (self.quantizer.config.num_dims, self.quantizer.config.num_buckets)
            if own != (self.prior.config.num_codes, self.prior.config.vocab_size):
                raise ValueError(
                    f"The prior writes {self.prior.config.num_codes} codes below {self.prior.config.vocab_size}, but "
                    f"the quantizer has {own[0]} below {own[1]}; they do not belong together."
                )
        else:
            check_scheduler(self.scheduler, False)

    @property
    def is_autoregressive(self) -> bool:
        """Whether the prior writes codes, and not denoises embeddings."""
        return isinstance(self.prior, LlamaGenForConditionalGeneration)

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings."""
        config = self.prior.config
        return config.condition_dim if self.is_autoregressive else config.embedding_dim

    @property
    def condition_length(self) -> int:
        """Positions of a prompt."""
        config = self.prior.config
        return config.condition_length if self.is_autoregressive else config.num_embeddings

    def sampling_settings(self, **given) -> dict[str, float]:
        """The settings of a call by name; `None` stands for the default of the checkpoint, or else of the library."""
        settings = dict(AUTOREGRESSIVE_DEFAULTS if self.is_autoregressive else DIFFUSION_DEFAULTS)
        settings |= self.config.sampling_defaults or {}
        return settings | {name: plain(value) for name, value in given.items() if value is not None}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        num_candidates: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        truncate_prompt: bool = False,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> EmbeddingPriorOutput | tuple:
        r"""Draw image embeddings.

        Args:
            prompt (`str` or `list[str]`): What the images show.
            negative_prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What guidance leads away from, in a diffusion prior.
            num_inference_steps (`int`, *optional*): Steps of a diffusion prior, from 1 to 1000. The checkpoint's
                `sampling_defaults` apply to this and all settings below, then 25.
            guidance_scale (`float`, *optional*):
                Strength of classifier-free guidance, at least 0; by default 1, which turns it off and halves the work.
            temperature, top_k, top_p (`float`, `int`, `float`, *optional*):
                How an autoregressive prior draws codes, see [`~llamagen_hf.llamagen.sampling.SamplingParams`].
            num_images_per_prompt (`int`, *optional*, defaults to 1): Embeddings for each prompt.
            num_candidates (`int`, *optional*):
                Embeddings to draw for each one, of which that with the larger dot product with the text embedding is
                returned; by default 2, as in the paper. The first is the one that would be drawn without.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise. With one per embedding, an embedding does not depend on the rest of the batch. By
                default each gets one of its own, whose seed is in the output's `parameters`.
            truncate_prompt (`bool`, *optional*, defaults to `False`): Cut prompts that are too long for CLIP.
            output_type (`str`, *optional*, defaults to `"pt"`): `"pt"` or `"np"`.
            return_dict (`bool`, *optional*, defaults to `True`): Else a tuple of one element.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, {"latents": latents})` with the `(batch,
                dim)` noisy standardised embeddings, candidates included; for an autoregressive prior after each code
                as `callback(pipe, step, step, {"codes": codes})`. A dict with a changed tensor may be returned, and
                `pipe._guidance_scale` may be set.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                What the callback's dict holds: `["latents"]`, or `["codes"]`.

        Returns:
            [`EmbeddingPriorOutput`] or `tuple`: The embeddings, prompt by prompt, and what made them.

        Raises:
            ValueError: If an argument does not fit.
        """
        inputs = PriorInputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            truncate_prompt=truncate_prompt,
            output_type=output_type,
        )
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        given |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "num_candidates": num_candidates}
        tensor = "codes" if self.is_autoregressive else "latents"
        names = [tensor] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        wanted = self._wanted_tensors(callback_on_step_end, names)
        if wanted not in ([], [tensor]):
            raise FieldError(
                "callback_on_step_end_tensor_inputs",
                f"`callback_on_step_end_tensor_inputs` is {wanted}; this prior has only {[tensor]}.",
            )
        prepared = self.prepare(inputs, given)
        output = self.finish(prepared, self._generate(prepared, callback_on_step_end, wanted))
        self.maybe_free_model_hooks()
        return output if return_dict else (output.image_embeds,)

    def check(self, inputs: PriorInputs, given: dict) -> dict:
        """Check the arguments of a call, and return its settings, none of them `None`.

        Raises:
            ValueError: If an argument, or the scheduler, does not fit.
        """
        inputs.check(reads_negative=not self.is_autoregressive)
        known = self.sampling_settings()
        if unknown := [name for name, value in given.items() if value is not None and name not in known]:
            kind = "An autoregressive" if self.is_autoregressive else "A diffusion"
            raise FieldError(unknown[0], f"{kind} prior takes no `{unknown[0]}`; leave it out.")
        settings = self.sampling_settings(**given)
        check_prior_settings(settings)
        if not self.is_autoregressive:
            check_scheduler(self.scheduler, False, self._trained_scheduler)
        return settings

    def prepare(self, inputs: PriorInputs, given: dict) -> PreparedPrior:
        """Check the arguments of a call, encode its prompts, and draw its noise.

        Raises:
            ValueError: If an argument, or the scheduler, does not fit.
        """
        settings = self.check(inputs, given)
        text, null_text = self.encode_prompt(inputs.prompts, inputs.truncate_prompt), None
        if settings["guidance_scale"] != 1 and not self.is_autoregressive:
            null_text = self.encode_prompt(inputs.negative_prompt or "", inputs.truncate_prompt)
        generators = image_generators(inputs.generator, inputs.num_images, settings["num_candidates"])
        parameters = self._describe(inputs, settings, generators)
        generators, rows = told_apart(generators), len(generators)
        if self.is_autoregressive:
            randomness = draw_noise_keys(rows, generators, self._execution_device)
        else:  # always float32, since a seed gives other numbers in another dtype
            shape, dtype = (self.embedding_dim,), torch.float32
            drawn = [torch.randn(shape, generator=each, device=each.device, dtype=dtype) for each in generators]
            randomness = torch.stack([row.to(self._execution_device) for row in drawn])
        null_text = None if null_text is None else null_text.repeated(rows)
        return PreparedPrior(inputs, settings, text.repeated(rows), null_text, randomness, generators, parameters)

    def _describe(self, inputs: PriorInputs, settings: dict, generators: list[torch.Generator]) -> list[dict]:
        """The parameters of each embedding that is drawn from `generators`, a candidate by itself."""
        conditions = []
        for index in range(count := len(generators)):
            condition = {}
            for name in ("prompt", "negative_prompt"):
                texts = getattr(inputs, name)
                if texts is not None:
                    condition[name] = texts if isinstance(texts, str) else texts[index * len(texts) // count]
            conditions.append(condition | ({"truncate_prompt": True} if inputs.truncate_prompt else {}))
        own = {name: value for name, value in settings.items() if name != "num_candidates"}
        return describe(conditions, own, generators, self.facts)

    def _steps(self, prepared: PreparedPrior) -> Iterator[EmbeddingStep]:
        """Each step of either kind; an autoregressive one has the codes so far as its sample."""
        settings, randomness = prepared.settings, prepared.randomness
        if not self.is_autoregressive:
            yield from denoise_embeddings(
                self.prior, self.scheduler, randomness, settings["num_inference_steps"], text=prepared.text,
                null_text=prepared.null_text, guidance_scale=settings["guidance_scale"],
                generators=prepared.generators,
            )  # fmt: skip
            return
        states, mask = prepared.text.padded_left
        sampling = {name: value for name, value in settings.items() if name != "num_candidates"}
        condition = {"prompt_embeds": states.to(self.prior.dtype), "prompt_attention_mask": mask}
        stream = CodeDecoder(self.prior).stream(randomness, **condition, **sampling)
        scale, codes = sampling["guidance_scale"], next(stream)
        for index in range(count := self.prior.config.num_codes):
            step = EmbeddingStep(index, count, torch.tensor(index), codes, scale)
            yield step
            if step.sample is not codes:
                codes.copy_(step.sample)
            if index + 1 < count:
                codes = stream.send(None if step.guidance_scale == scale else step.guidance_scale)
                scale = step.guidance_scale

    def _generate(
        self, prepared: PreparedPrior, callback: Callable | None = None, wanted: list[str] | None = None
    ) -> torch.Tensor:
        """What the last step leaves: standardised embeddings `(rows, dim)`, or codes `(rows, codes)`."""
        num_steps = prepared.settings.get("num_inference_steps")
        if num_steps is None:
            num_steps = self.prior.config.num_codes
        self._guidance_scale, self._num_timesteps = prepared.settings["guidance_scale"], num_steps
        with self.progress_bar(total=num_steps) as progress_bar:
            for step in self._steps(prepared):
                progress_bar.update()
                if callback is None:
                    continue
                self._guidance_scale = step.guidance_scale  # of this call, whatever runs beside it
                given = dict.fromkeys(wanted, step.sample)
                for name, changed in (callback(self, step.index, step.timestep, given) or {}).items():
                    if name in wanted:
                        if changed.shape != step.sample.shape:
                            raise FieldError(
                                name,
                                f"The callback returned `{name}` of shape {tuple(changed.shape)}; expected "
                                f"{tuple(step.sample.shape)}.",
                            )
                        step.sample = changed.to(step.sample)
                if self._guidance_scale != step.guidance_scale:
                    step.guidance_scale = self._guidance_scale or 1.0  # diffusers' callbacks turn it off by 0
                    check_prior_settings(prepared.settings | {"guidance_scale": step.guidance_scale})
        return step.sample

    def finish(self, prepared: PreparedPrior, sample: torch.Tensor) -> EmbeddingPriorOutput:
        """Turn what was drawn into embeddings, and choose among candidates by the dot product with the text's."""
        if self.is_autoregressive:
            embeds = self.quantizer.decode(sample)
        else:
            embeds = self.prior.post_process_latents(sample.to(self.prior.clip_std.device)).float()
        check_finite(embeds)
        embeds = F.normalize(embeds, dim=-1)
        scores = (embeds * F.normalize(prepared.text.embeds.float(), dim=-1).to(embeds)).sum(-1)
        count = prepared.settings["num_candidates"]
        best = [first + int(scores[first : first + count].argmax()) for first in range(0, len(scores), count)]
        embeds = embeds[best]
        return EmbeddingPriorOutput(
            image_embeds=embeds.cpu().numpy() if prepared.inputs.output_type == "np" else embeds,
            parameters=[prepared.parameters[row] for row in best],
            scores=scores[best].tolist(),
        )


# Saved pipelines name the module of a class. The package itself stays where it is, whatever moves within it.
EmbeddingPriorPipeline.__module__ = "llamagen_hf"
