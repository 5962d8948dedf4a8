"""One drawing of the pipeline: from what is asked for to the token loop, and from its codes to pictures."""

from typing import TYPE_CHECKING

import torch

from .candidates import Candidate, score_pictures
from .inputs import DrawingInputs
from .outputs import AutoregressiveImageOutput
from .parameters import describe
from .sampling import check_sampling, draw_uniforms


if TYPE_CHECKING:
    from .pipeline import AutoregressiveImagePipeline


class Drawing:
    """A drawing that can begin.

    Args:
        pipe ([`AutoregressiveImagePipeline`]): What draws.
        inputs ([`~llamagen_hf.inputs.DrawingInputs`]): What is asked for.

    Attributes:
        names (`list[str | None]`): Prompt or class name of each picture, candidates included.
        parameters (`list[dict]`): What makes each of them, see [`~llamagen_hf.parameters.describe`].
        arguments (`dict`): Those of [`~llamagen_hf.decoding.CodeDecoder.stream`].

    Raises:
        ValueError: In one sentence, if an argument does not fit the others or the checkpoint.
    """

    def __init__(self, pipe: "AutoregressiveImagePipeline", inputs: DrawingInputs):
        self.pipe, self.inputs = pipe, inputs
        config, device = pipe.transformer.config, pipe._execution_device
        inputs.check(config, pipe.image_size, pipe.tokenizer if pipe.text_encoder is not None else None)
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
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
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
        """The generator of each picture, candidates included."""
        generators, count = self.inputs.generator, self.inputs.num_images
        if generators is None:
            # Seeds rather than numbers from torch's own state: with them a picture can be drawn again.
            generators = [torch.Generator().manual_seed(seed) for seed in torch.randint(2**62, (count,)).tolist()]
        elif isinstance(generators, torch.Generator):
            generators = [generators] * count
        return [generator for generator in generators for _ in range(self.inputs.num_candidates)]

    def finish(self, codes: torch.LongTensor) -> AutoregressiveImageOutput:
        """Turn the codes `(batch, num_codes)` that were drawn into pictures, and choose among candidates."""
        inputs, pipe = self.inputs, self.pipe
        grid_size = pipe.transformer.config.grid_size
        images = codes = codes.unflatten(1, (grid_size, grid_size))
        if inputs.output_type != "codes":
            images = pipe.decode_codes(codes, inputs.output_type)
        if inputs.num_candidates == 1:
            return AutoregressiveImageOutput(images, codes, self.parameters)

        pictures = images if inputs.output_type == "pil" else pipe.decode_codes(codes)
        scores = score_pictures(inputs.scorer, pictures, self.names)
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
