"""`PriorDecoderPipeline`: a prior draws an image embedding, and a decoder draws an image from it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image

from ..arguments import FieldError, is_count, plain
from ..conditioning.text import PromptLoss
from ..diffusion.pipeline import PixelDiffusionPipeline
from ..diffusion.unet import condition_dim
from ..llamagen.pipeline import AutoregressiveImagePipeline
from ..loading.parts import PartsMixin
from ..outputs import GenerationStep
from ..reproducibility import check_generator, clone, image_generators, next_generators
from ..reranking import Scorer
from .clip_encoders import check_finite
from .decoder_output import Embeddings, PriorDecoderOutput, divided
from .interpolation import slerp
from .prior import EmbeddingPriorPipeline


PRIOR_PREFIX = "prior_"


class PriorDecoderPipeline(PartsMixin, DiffusionPipeline):
    r"""Draws images as DALL-E 2 (arXiv 2204.06125) does: from a caption an image embedding, and from that an image.

    Since the decoder knows nothing but the embedding, it also draws variations of an image, and what lies between two.
    The pipeline has the loading, saving, device and offloading methods of any [`~diffusers.DiffusionPipeline`]; they
    reach both parts. It may be the base of a [`CascadePipeline`], which enlarges its images.

    Args:
        prior ([`EmbeddingPriorPipeline`]): Draws the embeddings.
        decoder ([`PixelDiffusionPipeline`] or [`AutoregressiveImagePipeline`]):
            Draws images from prompts of one position, which is an embedding of length 1.

    Example:

    ```python
    >>> from llamagen_hf import PriorDecoderPipeline

    >>> pipe = PriorDecoderPipeline.from_pretrained("runs/unclip")
    >>> pipe("a red apple").save("apple.png")
    >>> pipe.variation(image, num_images_per_prompt=4).save("variation.png")
    ```
    """

    def __init__(self, prior: EmbeddingPriorPipeline, decoder: PixelDiffusionPipeline | AutoregressiveImagePipeline):
        super().__init__()
        if not isinstance(prior, EmbeddingPriorPipeline):
            raise ValueError(f"`prior` must be an EmbeddingPriorPipeline, not {type(prior).__name__}.")
        if not isinstance(decoder, (PixelDiffusionPipeline, AutoregressiveImagePipeline)):
            raise ValueError(
                "`decoder` must be a PixelDiffusionPipeline or an AutoregressiveImagePipeline, not "
                f"{type(decoder).__name__}."
            )
        length, dim = _condition_shape(decoder)
        if length != 1:
            takes = "no prompts" if length is None else f"prompts of {length} positions"
            raise ValueError(f"`decoder` takes {takes}; expected one that draws from an embedding, a single position.")
        if dim != prior.embedding_dim:
            raise ValueError(
                f"The prior's embeddings are {prior.embedding_dim} wide, but the decoder takes {dim}; they do not "
                "belong together."
            )
        self.register_modules(prior=prior, decoder=decoder)

    @property
    def condition_kind(self) -> str:
        """It draws from prompts: `"text"`."""
        return "text"

    @property
    def num_classes(self) -> None:
        """There are no classes."""
        return None

    @property
    def upsamples(self) -> bool:
        """It draws images, and enlarges none."""
        return False

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return self.decoder.image_size

    @property
    def grid_size(self) -> None:
        """There is no grid of codes to complete, whatever the decoder draws."""
        return None

    @property
    def codebook_size(self) -> int | None:
        """How many codes the decoder draws from; `None` if it draws no codes."""
        return self.decoder.codebook_size

    @property
    def varies_images(self) -> bool:
        """Whether it draws [`variation`]s, for which the prior needs an image encoder with its image processor."""
        return self.prior.image_encoder is not None and self.prior.image_processor is not None

    def find_loss(self, prompt: str) -> PromptLoss | None:
        """What CLIP does not read of a prompt, see [`~llamagen_hf.conditioning.text.find_loss`]."""
        return self.prior.find_loss(prompt)

    @property
    def facts(self) -> dict:
        """What the parameters of all images say about the decoder, and below `"prior"` about the prior."""
        return self.decoder.facts | {"prior": self.prior.facts} | self._origin

    def sampling_settings(self, **given) -> dict:
        """The settings of a call by name, those of the prior with `prior_` before; `None` stands for the default."""
        prior, decoder = _split(given)
        prior = {PRIOR_PREFIX + name: value for name, value in self.prior.sampling_settings(**prior).items()}
        return prior | self.decoder.sampling_settings(**decoder)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        image_embeds: torch.Tensor | None = None,
        prior_num_inference_steps: int | None = None,
        prior_guidance_scale: float | None = None,
        prior_num_candidates: int | None = None,
        num_images_per_prompt: int = 1,
        num_candidates: int = 1,
        scorer: Scorer | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        truncate_prompt: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        **decoder_kwargs,
    ) -> PriorDecoderOutput | tuple:
        r"""Draw images.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw. Each image gets an embedding of its own.
            image_embeds (`torch.Tensor` of shape `(batch, dim)`, *optional*):
                Image embeddings in place of prompts, as [`encode_image`] and outputs have them.
            prior_num_inference_steps, prior_guidance_scale, prior_num_candidates (*optional*):
                The prior's settings, see [`EmbeddingPriorPipeline.__call__`], whose other settings are also given
                with `prior_` before. By default those of its checkpoint.
            num_images_per_prompt (`int`, *optional*, defaults to 1): Images for each prompt or embedding.
            num_candidates (`int`, *optional*, defaults to 1):
                Images to decode for each embedding, of which the best by `scorer` or a LlamaGen itself is returned.
            scorer (`Callable`, *optional*):
                Takes a list of PIL images and one of prompts, returns a number for each, higher is better.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the draws. With one per image, an image does not depend on the rest of the batch: the prior
                draws from it, and then it gives the seed of the decoder, which is in the parameters. The decoder draws
                from it directly if there is no prompt. By default each image gets one of its own.
            truncate_prompt (`bool`, *optional*, defaults to `False`): Cut prompts that are too long for CLIP.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`; `"np"` `(batch, height, width, 3)` or `"pt"` `(batch, 3, height, width)` in [0, 1].
            return_dict (`bool`, *optional*, defaults to `True`): Else a tuple of one element.
            decoder_kwargs: What else the decoder takes, such as `guidance_scale` and `callback_on_step_end`.

        Returns:
            [`PriorDecoderOutput`] or `tuple`: The images, prompt by prompt, and what made them.

        Raises:
            ValueError: If an argument does not fit.
        """
        found, call = self.prepare(
            prompt,
            image_embeds=image_embeds,
            num_images_per_prompt=num_images_per_prompt,
            num_candidates=num_candidates,
            scorer=scorer,
            generator=generator,
            truncate_prompt=truncate_prompt,
            prior_num_inference_steps=prior_num_inference_steps,
            prior_guidance_scale=prior_guidance_scale,
            prior_num_candidates=prior_num_candidates,
            **decoder_kwargs,
        )
        output = found.output(self.decoder(**call, output_type=output_type), self._origin)
        return output if return_dict else (output.images,)

    def variation(self, image: Image.Image | list[Image.Image], **kwargs) -> PriorDecoderOutput | tuple:
        """Draw images with the content of others (arXiv 2204.06125, section 3.1).

        Args:
            image (`PIL.Image.Image` or `list[PIL.Image.Image]`): Of any size.
            kwargs: As for [`__call__`], bar `prompt`. Another seed gives another variation.

        Raises:
            ValueError: If the prior has no image encoder, or an argument does not fit.
        """
        return self(image_embeds=self.encode_image(image), **kwargs)

    def interpolate(
        self,
        a: Image.Image | str | torch.Tensor,
        b: Image.Image | str | torch.Tensor,
        weight: float | list[float] = 0.5,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs,
    ) -> PriorDecoderOutput | tuple:
        """Draw what lies between two images or prompts (arXiv 2204.06125, section 3.2).

        Args:
            a, b (`PIL.Image.Image`, `str` or `torch.Tensor` of shape `(dim,)` or `(1, dim)`):
                Images, prompts or image embeddings.
            weight (`float` or `list[float]`, *optional*, defaults to 0.5): How much of `b`, in [0, 1]; an image each.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): As for [`__call__`]. With generators
                of one seed only the content changes along the way.
            kwargs: As for [`__call__`], bar `prompt`. Settings with `prior_` before are for prompts.

        Raises:
            ValueError: If an argument does not fit.
        """
        weights = plain(weight)
        weights = weights if isinstance(weights, list) else [weights]
        if not weights or not all(isinstance(w, (int, float)) and 0 <= w <= 1 for w in weights):
            raise FieldError("weight", f"`weight` is {weight}; expected a number in [0, 1], or a list of them.")
        prior, rest = _split(kwargs)
        if isinstance(generator, torch.Generator):
            generator = [generator] * (len(weights) * rest.get("num_images_per_prompt", 1))
        first = generator[0] if generator else torch.Generator().manual_seed(0)
        truncate = rest.pop("truncate_prompt", False)
        ends = [self._embed_end(each, name, first, prior, truncate) for each, name in ((a, "a"), (b, "b"))]
        embeds = torch.stack([slerp(*ends, each) for each in weights])
        return self(image_embeds=embeds, generator=generator, **rest)

    def _embed_end(self, end, name: str, generator: torch.Generator, prior: dict, truncate: bool) -> torch.Tensor:
        """The embedding `(dim,)` of one end of an interpolation; both ends of prompts have the same noise."""
        if isinstance(end, Image.Image):
            return self.encode_image(end)[0]
        if isinstance(end, str):
            return self.prior(end, generator=clone(generator), truncate_prompt=truncate, **prior).image_embeds[0]
        if not isinstance(end, torch.Tensor) or end.numel() != self.prior.embedding_dim:
            raise FieldError(
                name,
                f"`{name}` must be an image, a prompt or an embedding of {self.prior.embedding_dim} numbers, not "
                f"{type(end).__name__}.",
            )
        return self._check_embeds(end.reshape(1, -1))[0]

    def encode_image(self, image: Image.Image | list[Image.Image]) -> torch.Tensor:
        """Embed images `(batch, dim)` by the prior's CLIP, see [`EmbeddingPriorPipeline.encode_image`]."""
        return self.prior.encode_image(image)

    @torch.no_grad()
    def stream(self, prompt=None, *, preview_every: int | None = None, **kwargs) -> Iterator[GenerationStep]:
        """Draw images and show them on the way. Leaving the loop stops the work.

        Args:
            prompt, kwargs: As for [`__call__`], bar `return_dict` and callbacks.
            preview_every (`int`, *optional*): The decoder's steps between previews; by default it decides.

        Yields:
            [`~llamagen_hf.outputs.GenerationStep`]: The decoder's, whose steps are counted. In the last step the
            images themselves.

        Raises:
            ValueError: If an argument does not fit.
        """
        every = {} if preview_every is None else {"preview_every": preview_every}
        output_type = kwargs.pop("output_type", "pil")
        found, call = self.prepare(prompt, **kwargs)
        for step in self.decoder.stream(**call, output_type=output_type, **every):
            if step.output is not None:
                step.output = found.output(step.output, self._origin)
            yield step

    @torch.no_grad()
    def draw_pixels(self, prompt=None, **kwargs) -> torch.Tensor:
        """Draw images to measure: their pixels before they are clamped.

        Args:
            prompt, kwargs: As for [`__call__`], bar `output_type`, `return_dict` and callbacks.

        Returns:
            `torch.Tensor` of shape `(batch, 3, height, width)`: float32, nominally in [-1, 1].
        """
        return self.decoder.draw_pixels(**self.prepare(prompt, **kwargs)[1])

    def redraw(self, parameters: dict, output_type: str = "pil") -> PriorDecoderOutput:
        """Draw an image again from the parameters that made it.

        With the same checkpoint, device, dtype and library versions it is the same to the last bit.

        Args:
            parameters (`dict`): One of an output's `parameters`, or what
                [`~llamagen_hf.provenance.read_parameters`] reads.
            output_type (`str`, *optional*, defaults to `"pil"`): As for [`__call__`].

        Raises:
            ValueError: If they do not determine an image, or do not fit the parts.
        """
        decoder, prior, embed = divided(parameters)
        if prior is not None:
            embeds = self.prior.redraw(prior).image_embeds
        else:
            try:
                embeds = torch.tensor([embed], dtype=torch.float32)
            except (TypeError, ValueError) as error:
                raise ValueError("These parameters are damaged: image_embeds is not a list of numbers.") from error
            if embeds.shape != (1, self.prior.embedding_dim):
                raise ValueError(
                    f"The image was drawn from an embedding of {len(embed)} numbers; here they have "
                    f"{self.prior.embedding_dim}."
                )
        output = self.decoder.redraw(decoder, prompt_embeds=embeds[:, None], output_type=output_type)
        return PriorDecoderOutput(output.images, [parameters], embeds)

    def prepare(
        self,
        prompt=None,
        *,
        image_embeds=None,
        num_images_per_prompt=1,
        num_candidates=1,
        scorer=None,
        generator=None,
        truncate_prompt=False,
        **settings,
    ) -> tuple[Embeddings, dict]:
        """The embeddings of a call, and the arguments with which the decoder draws from them.

        Raises:
            ValueError: If an argument does not fit.
        """
        prior, decoder = _split(settings)
        per_condition = plain(num_images_per_prompt)
        if (prompt is None) == (image_embeds is None):
            raise FieldError("prompt", "Pass either `prompt` or `image_embeds`.")
        if not is_count(per_condition):
            raise FieldError(
                "num_images_per_prompt",
                f"`num_images_per_prompt` is {per_condition}; expected an integer of at least 1.",
            )
        if prompt is None:
            if unknown := [name for name, value in prior.items() if value is not None]:
                name = PRIOR_PREFIX + unknown[0]
                raise FieldError(name, f"`{name}` is for prompts; with image embeddings the prior does not draw.")
            embeds = self._check_embeds(image_embeds).repeat_interleave(per_condition, 0)
            check_generator(generator, len(embeds))
            found = Embeddings(embeds, [None] * len(embeds), None, image_generators(generator, len(embeds)))
        else:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            count = len(prompts) * per_condition if isinstance(prompts, list) else 1  # the prior says what is wrong
            check_generator(generator, count)
            generators = image_generators(generator, count)
            call = {"num_images_per_prompt": per_condition, "truncate_prompt": truncate_prompt}
            try:
                drawn = self.prior(prompt, **prior, **call, generator=generators)
            except FieldError as error:
                if error.field not in prior:
                    raise
                name = PRIOR_PREFIX + error.field
                raise FieldError(name, str(error).replace(f"`{error.field}`", f"`{name}`")) from error
            names = [name for name in prompts for _ in range(per_condition)]
            found = Embeddings(drawn.image_embeds, names, drawn.parameters, next_generators(generators))
        call = {
            "prompt_embeds": found.embeds[:, None],
            "generator": found.generators,
            "num_candidates": num_candidates,
        }
        if scorer is not None:  # the decoder knows no prompts
            call["scorer"] = lambda images, _: scorer(
                images, [name for name in found.names for _ in range(len(images) // len(found.names))]
            )
        return found, call | decoder

    def _check_embeds(self, embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings that were given, checked, in float32 and of length 1."""
        dim = self.prior.embedding_dim
        if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2 or embeds.shape[1] != dim or not len(embeds):
            what = f"has shape {tuple(embeds.shape)}" if isinstance(embeds, torch.Tensor) else "is no tensor"
            raise FieldError("image_embeds", f"`image_embeds` {what}; expected (batch, {dim}).")
        check_finite(embeds)
        return F.normalize(embeds.float(), dim=-1)


def _condition_shape(decoder) -> tuple[int | None, int | None]:
    """Positions and width of the states that a decoder takes; `None` if it takes none."""
    if isinstance(decoder, PixelDiffusionPipeline):
        takes = decoder.reads_text and not decoder.upsamples
        return (decoder.config.condition_length, condition_dim(decoder.unet)) if takes else (None, None)
    config = decoder.generator_config
    return (config.condition_length, config.condition_dim) if config.conditioning == "text" else (None, None)


def _split(settings: dict) -> tuple[dict, dict]:
    """The settings of the prior, under its own names, and those of the decoder."""
    prior = {name for name in settings if name.startswith(PRIOR_PREFIX)}
    own = {name.removeprefix(PRIOR_PREFIX): settings[name] for name in prior}
    return own, {name: value for name, value in settings.items() if name not in prior}


# Saved pipelines name the module of a class. The package itself stays where it is, whatever moves within it.
PriorDecoderPipeline.__module__ = "llamagen_hf"
