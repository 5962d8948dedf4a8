"""transformers' `generate` for images: adds text conditions and grid positions, and stops when the grid is full."""

import torch
import torch.nn.functional as F
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .loss import check_inputs


class CodeGenerationMixin(GenerationMixin):
    """[`~transformers.GenerationMixin`] for a generator of codes."""

    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        *args,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.LongTensor | ModelOutput:
        """Generate codes until the grid is full.

        Args:
            inputs (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                Class mode: the class ids and the first codes, if any. Text mode: the first codes, if any.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Text mode: the text encoder's states, padded on the left.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, condition_length)`, *optional*):
                1 for words, 0 for padding; by default all 1.
            args, kwargs: Passed to [`~transformers.GenerationMixin.generate`]. With `guidance_scale`,
                `negative_prompt_ids` defaults to the null class.

        Returns:
            `torch.LongTensor` or [`~transformers.utils.ModelOutput`]: `inputs` followed by the generated codes, in
            the form in which transformers returns them.

        Raises:
            ValueError: If the condition is missing or does not fit the model, if no code is left to generate, or if
                guidance is requested for text or for a beam search, where `generate` has none.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        is_text, has_embeds = self.config.conditioning == "text", kwargs.get("inputs_embeds") is not None
        if not is_text and inputs is None and not has_embeds and prompt_embeds is None:
            raise ValueError("This model is class-conditional: pass the class in `inputs`.")
        defaults = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        scale, num_beams = (
            kwargs.get(name) or getattr(defaults, name, None) for name in ("guidance_scale", "num_beams")
        )
        if scale not in (None, 1):
            if is_text or has_embeds or (num_beams or 1) > 1:
                what = "a beam search" if not is_text and not has_embeds else "without a class"
                raise ValueError(f"`generate` can't guide {what}: use AutoregressiveImagePipeline.")
            kwargs["negative_prompt_ids"] = self._unconditional_ids(inputs, defaults, kwargs)
        if kwargs.get("max_length") is not None:
            kwargs.setdefault("max_new_tokens", None)  # or its default would take precedence
        if not is_text and prompt_embeds is None:
            return super().generate(inputs, *args, **kwargs)
        if has_embeds:
            return super().generate(inputs, *args, **kwargs)

        check_inputs(self.config, inputs, None, prompt_embeds, prompt_attention_mask, None)
        batch = len(prompt_embeds)
        codes = torch.empty(batch, 0, dtype=torch.long, device=prompt_embeds.device) if inputs is None else inputs
        if prompt_attention_mask is None:
            prompt_attention_mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=prompt_embeds.device)
        with torch.no_grad():
            kwargs["inputs_embeds"] = self.model.embed(codes, prompt_embeds, is_start=False)
        kwargs["attention_mask"] = F.pad(prompt_attention_mask, (0, codes.shape[1]), value=1)
        output = super().generate(None, *args, **kwargs)
        drawn = output.sequences if isinstance(output, ModelOutput) else output
        drawn = torch.cat([codes.repeat_interleave(len(drawn) // batch, 0), drawn], dim=1)
        if not isinstance(output, ModelOutput):
            return drawn
        output.sequences = drawn
        return output

    def _unconditional_ids(self, inputs: torch.LongTensor, defaults, kwargs: dict) -> torch.LongTensor:
        """Return the null condition followed by the given codes, one row per sequence."""
        null = kwargs.get("negative_prompt_ids")
        if null is None:
            null = torch.full_like(inputs[:, :1], self.config.null_class_id)
        null = torch.cat([null.expand(len(inputs), -1), inputs[:, null.shape[1] :]], dim=1)
        count = kwargs.get("num_return_sequences") or getattr(defaults, "num_return_sequences", None) or 1
        return null.repeat_interleave(count, 0)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        # transformers counts from the first word, but positions on the grid are absolute, whatever the padding.
        cache = model_kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(inputs_tensor.shape[1] + past, device=inputs_tensor.device)
        return positions.expand(len(inputs_tensor), -1)

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        generation_config = super()._prepare_generated_length(generation_config, *args, **kwargs)
        given = kwargs["inputs_tensor"].shape[1] - self.config.condition_length
        if given >= self.config.num_codes:
            raise ValueError(f"All {self.config.num_codes} codes are given: none is left to generate.")
        end = kwargs["input_ids_length"] + self.config.num_codes - given
        generation_config.max_length = min(generation_config.max_length, end)
        generation_config.min_length = min(generation_config.min_length or 0, end)
        return generation_config

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        if inputs_embeds is not None and past_key_values is None and not is_first_iteration:
            # Without a cache, every step reads the whole sequence, and transformers would leave out the embeddings.
            inputs_embeds = torch.cat([inputs_embeds, self.model.embed_tokens(input_ids)], dim=1)
            is_first_iteration = True
        return super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
