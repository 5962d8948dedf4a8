"""One drawing of the pipeline: from what is asked for to the token loop, and from its codes to images."""

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..arguments import FieldError
from ..reranking import Candidate, score_images
from .inputs import GenerationInputs
from .parameters import describe
from .pipeline_output import AutoregressiveImageOutput
from .sampling import check_sampling, draw_uniforms


if TYPE_CHECKING:
    from .pipeline import AutoregressiveImagePipeline


class CallbackStateMixin:
    """What a callback may look at and change of the call that runs, under the names of diffusers' pipelines."""

    _guidance_scale: float | None = None
    _num_timesteps: int | None = None
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float | None:
        """Strength of guidance in the call that runs, or the last one. A callback changes it as `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether conditional and unconditional logits are combined; at 0 and 1 one of them does not count."""
        return self._guidance_scale not in (None, 0, 1)

    @property
    def num_timesteps(self) -> int | None:
        """Codes that the call that runs is to draw, or the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call is to stop after the code that it draws; set `_interrupt` to `True` for that."""
        return self._interrupt


class Drawing:
    """A drawing that can begin.

    Args:
        pipe ([`AutoregressiveImagePipeline`]): What draws.
        inputs ([`~llamagen_hf.llamagen.inputs.GenerationInputs`]): What is asked for.

    Attributes:
        names (`list[str | None]`): Prompt or class name of each image, candidates included.
        parameters (`list[dict]`): What makes each of them, see [`~llamagen_hf.llamagen.parameters.describe`].
        arguments (`dict`): Those of [`~llamagen_hf.llamagen.decoding.CodeDecoder.stream`].

    Raises:
        ValueError: In one sentence, if an argument does not fit the others or the checkpoint.
    """

    def __init__(self, pipe: "AutoregressiveImagePipeline", inputs: GenerationInputs):
        self.pipe, self.inputs = pipe, inputs
        config, device = pipe.require("transformer", "which draws").config, pipe._execution_device
        needs_pixels = (inputs.image, inputs.height, inputs.width, inputs.scorer) != (None,) * 4
        if inputs.output_type != "codes" or needs_pixels:
            pipe.require("vq_model", "without which it draws only output_type='codes'")
        inputs.check(
            config,
            pipe.image_size if pipe.vq_model is not None else 0,
            pipe.tokenizer if pipe.text_encoder is not None else None,
        )
        settings = pipe.sampling_settings(**inputs.sampling)
        check_sampling(**settings)

        tensors, names = self._conditions()
        prefix = self._prefix()
        if prefix is not None:
            tensors["prefix_codes"] = prefix.to(device, torch.long).repeat_interleave(
                inputs.num_images // len(prefix), 0
            )
        tensors = {name: value.repeat_interleave(inputs.num_drawn // len(value), 0) for name, value in tensors.items()}
        self.names = [name for name in names for _ in range(inputs.num_drawn // len(names))]

        generators = self._generators()
        self.parameters = describe(inputs, settings, generators, tensors.get("prefix_codes"), pipe.facts)
        uniforms = draw_uniforms(inputs.num_drawn, config.num_codes, generators, device)
        self.arguments = tensors | settings | {"uniforms": uniforms}

    def _conditions(self) -> tuple[dict[str, torch.Tensor], list[str | None]]:
        """Tensors of the prompts or classes, and their names."""
        pipe, inputs, config = self.pipe, self.inputs, self.pipe.transformer.config
        device = pipe._execution_device
        if not pipe.is_text_conditional:
            class_ids = pipe.get_class_ids(inputs.class_labels)
            names = [(config.id2label or {}).get(i, str(i)) for i in (class_ids - config.vocab_size).tolist()]
            return {"class_ids": class_ids.to(device)}, names
        embeds, mask = inputs.prompt_embeds, inputs.prompt_attention_mask
        if embeds is None:
            embeds, mask = pipe.encode_prompt(inputs.prompt)
        elif mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        tensors = {
            "prompt_embeds": embeds.to(device, pipe.transformer.dtype),
            "prompt_attention_mask": mask.to(device, torch.long),
        }
        return tensors, [None] * len(embeds) if inputs.prompt is None else inputs.conditions

    def _prefix(self) -> torch.Tensor | None:
        if self.inputs.image is None:
            return self.inputs.prefix_codes
        return self.pipe.encode_image(self.inputs.image)[:, : self.inputs.keep_rows].flatten(1)

    def _generators(self) -> list[torch.Generator]:
        """The generator of each image, candidates included."""
        generators, count = self.inputs.generator, self.inputs.num_images
        if generators is None:
            # Seeds rather than numbers from torch's own state: with them an image can be drawn again.
            seeds = torch.randint(2**62, (count,), device="cpu").tolist()
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        elif isinstance(generators, torch.Generator):
            generators = [generators] * count
        return [generator for generator in generators for _ in range(self.inputs.num_candidates)]

    def draw(self, callback: Callable | None, tensor_inputs: list[str]) -> torch.LongTensor:
        """Draw the codes `(batch, n)`, fewer than all if that is interrupted; arguments as for the pipeline's call.

        Raises:
            ValueError: If the callback wants tensors that there are not, or makes of them what can't be drawn on.
        """
        pipe, config = self.pipe, self.pipe.transformer.config
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback.tensor_inputs
        if unknown := set(tensor_inputs) - set(pipe._callback_tensor_inputs):
            raise FieldError(
                "callback_on_step_end_tensor_inputs",
                f"`callback_on_step_end_tensor_inputs` names {sorted(unknown)}; there is only "
                f"{pipe._callback_tensor_inputs}.",
            )
        first = self.arguments["prefix_codes"].shape[1] if "prefix_codes" in self.arguments else 0
        condition = self.arguments.get("prompt_embeds")
        tensors = {"prompt_embeds": self.arguments["class_ids"][:, None] if condition is None else condition}
        scale, changed_scale = self.arguments["guidance_scale"], None
        pipe._guidance_scale, pipe._num_timesteps, pipe._interrupt = scale, config.num_codes - first, False
        progress_bar = pipe.progress_bar(total=config.num_codes)
        with progress_bar, closing(pipe.decoder.stream(**self.arguments)) as stream:
            for index in range(first, config.num_codes):
                codes = stream.send(changed_scale)
                progress_bar.update(codes.shape[1] - progress_bar.n)
                if callback is not None:
                    pipe._guidance_scale = scale  # of this call, whatever runs beside it
                    tensors["codes"] = codes
                    given = {name: tensors[name] for name in tensor_inputs}
                    changed = (callback(pipe, index - first, index, given) or {}).get("codes")
                    if changed is not None:
                        check_codes(changed, codes.shape, config.vocab_size)
                        codes.copy_(changed)
                    if pipe._guidance_scale != scale:
                        scale = pipe._guidance_scale
                        changed_scale = scale or 1.0  # diffusers' callbacks turn guidance off by 0
                        check_sampling(guidance_scale=changed_scale)
                if pipe.interrupt:
                    break
        return codes

    def finish(self, codes: torch.LongTensor) -> AutoregressiveImageOutput:
        """Turn the codes `(batch, num_codes)` that were drawn into images, and choose among candidates."""
        inputs, pipe = self.inputs, self.pipe
        grid_size = pipe.transformer.config.grid_size
        decode = pipe.decode_codes
        if codes.shape[1] == grid_size**2:
            codes = codes.unflatten(1, (grid_size, grid_size))
        else:  # interrupted
            self.parameters = [each | {"interrupted_after": codes.shape[1]} for each in self.parameters]
            decode = pipe.preview
        images = codes if inputs.output_type == "codes" else decode(codes, inputs.output_type)
        if inputs.num_candidates == 1:
            return AutoregressiveImageOutput(images, codes, self.parameters)

        pictures = images if inputs.output_type == "pil" else decode(codes)
        scores = score_images(inputs.scorer, pictures, self.names)
        drawn = [Candidate(*row) for row in zip(images, scores, codes, self.parameters, strict=True)]
        groups = [
            range(len(drawn))[i : i + inputs.num_candidates] for i in range(0, len(drawn), inputs.num_candidates)
        ]
        ranked = [sorted(group, key=lambda i: scores[i], reverse=True) for group in groups]
        best = [rank[0] for rank in ranked]
        return AutoregressiveImageOutput(
            images=[images[i] for i in best] if isinstance(images, list) else images[best],
            codes=codes[best],
            parameters=[self.parameters[i] for i in best],
            candidates=[[drawn[i] for i in rank] for rank in ranked],
        )


def check_codes(codes: torch.Tensor, shape: torch.Size, vocab_size: int) -> None:
    """Raise a `ValueError` if codes that a callback gives back can't take the place of those that it was given."""
    if not isinstance(codes, torch.Tensor) or codes.is_floating_point() or codes.shape != shape:
        found = f"of shape {tuple(codes.shape)}, {codes.dtype}" if isinstance(codes, torch.Tensor) else repr(codes)
        raise ValueError(f"The callback gave back `codes` {found}; expected integers of shape {tuple(shape)}.")
    if not (0 <= codes.min() and codes.max() < vocab_size):
        raise ValueError(
            f"The callback gave back `codes` of {int(codes.min())}..{int(codes.max())}; expected 0..{vocab_size - 1}."
        )
