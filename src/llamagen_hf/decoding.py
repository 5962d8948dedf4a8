"""The token loop: a condition in, a grid of codes out, one code a step."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch._inductor.config
import torch.nn.functional as F
from transformers import StaticCache

from .modeling import LlamaGenForConditionalGeneration
from .sampling import guide, is_guided, sample


class CodeDecoder:
    """Draws codes from a [`LlamaGenForConditionalGeneration`] with static shapes.

    The keys and values of all layers live in one cache of fixed size, allocated when the batch size changes and
    reused until then. The condition is read eagerly; after it, every code is one call of a step whose shapes never
    change, which [`compile`] turns into a single graph.

    Args:
        model ([`LlamaGenForConditionalGeneration`]): In evaluation mode.
    """

    def __init__(self, model: LlamaGenForConditionalGeneration):
        self.model = model
        self._cache = None
        self._cache_key = None
        self._step = self._eager_step
        self._freezes = False

    def compile(self, **kwargs) -> None:
        """Compile the one-code step, `fullgraph=True`.

        The first drawing with a new batch size then takes a minute or so. Each of them keeps its own graph; torch
        allows eight (`torch._dynamo.config.recompile_limit`).

        Args:
            kwargs: For `torch.compile`. By default CUDA graphs on an accelerator; on a CPU, weights frozen into the
                graph and the fastest of several kernels. Frozen weights ignore later changes, so compile last.
        """
        self._freezes = False  # an earlier call may have set it
        if not kwargs.keys() & {"mode", "options"}:
            if self.model.device.type == "cpu":
                kwargs["options"] = {"max_autotune": True}
                self._freezes = True
            else:
                kwargs["mode"] = "reduce-overhead"
        self._step = torch.compile(self._eager_step, **{"fullgraph": True, "dynamic": False, **kwargs})

    def _eager_step(self, codes, cache, attention_mask) -> torch.Tensor:
        output = self.model(
            input_ids=codes, past_key_values=cache, attention_mask=attention_mask, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1]

    def _static_cache(self, rows: int, length: int, device: torch.device) -> StaticCache:
        # Tensors made in inference mode can't be updated outside of it.
        key = (rows, length, self.model.dtype, device, torch.is_inference_mode_enabled())
        if key != self._cache_key:
            self._cache = None  # free the old one first
            self._cache, self._cache_key = StaticCache(config=self.model.config, max_cache_len=length), key
        else:
            self._cache.reset()
        return self._cache

    def _freezing(self) -> AbstractContextManager:
        # Not an option of torch.compile: the tracer, which turns weights into constants, reads the global setting.
        return torch._inductor.config.patch(freezing=True) if self._freezes else nullcontext()

    @torch.no_grad()
    def __call__(
        self,
        uniforms: torch.Tensor,
        class_ids: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        callback: Callable[[int, torch.LongTensor], torch.LongTensor | None] | None = None,
    ) -> torch.LongTensor:
        """Draw all codes of a batch of images.

        Args:
            uniforms (`torch.Tensor` of shape `(batch, codes)`):
                Random numbers in [0, 1), one for each code to draw, on the device that the model runs on.
            class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): Input ids of the classes, class mode.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Left-padded text states, text mode.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, condition_length)`, *optional*): 0 for padding.
            guidance_scale (`float`, *optional*, defaults to 1.0): 1 draws without the unconditional half.
            guidance_interval (`int`, *optional*, defaults to -1): See [`~llamagen_hf.sampling.is_guided`].
            temperature, top_k, top_p: See [`~llamagen_hf.sampling.sample`].
            callback (`Callable`, *optional*):
                Called as `callback(i, codes)` after code i, with the `(batch, i + 1)` codes so far. It may return
                codes of that shape to go on from instead; only the last one can still change what follows.

        Returns:
            `torch.LongTensor` of shape `(batch, codes)`: The codes in raster order.

        Raises:
            ValueError: If the logits overflow, as they may in float16.
        """
        model, config = self.model, self.model.config
        # The model's own device means nothing while its weights are offloaded.
        (batch, num_codes), device = uniforms.shape, uniforms.device
        guided = guidance_scale != 1
        if prompt_embeds is not None:
            condition_length = prompt_embeds.shape[1]
            if prompt_attention_mask is None:
                prompt_attention_mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=device)
            if guided:
                null = model.model.uncond_embedding(batch).to(prompt_embeds)
                prompt_embeds = torch.cat([prompt_embeds, null])
                prompt_attention_mask = prompt_attention_mask.repeat(2, 1)
            condition = {"prompt_embeds": prompt_embeds}
        else:
            condition_length = 1
            if guided:
                class_ids = torch.cat([class_ids, torch.full_like(class_ids, config.null_class_id)])
            condition = {"input_ids": class_ids[:, None]}

        length = -(-(condition_length + num_codes) // 8) * 8  # attention kernels like multiples of 8
        cache = self._static_cache(2 * batch if guided else batch, length, device)
        attention_mask = None
        if prompt_attention_mask is not None:
            attention_mask = F.pad(prompt_attention_mask, (0, length - condition_length), value=1)

        codes = torch.empty(batch, num_codes, dtype=torch.long, device=device)
        logits = model(
            **condition, past_key_values=cache, attention_mask=attention_mask, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        for index in range(num_codes):
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = conditional
                if is_guided(index, guidance_interval):
                    logits = guide(conditional, unconditional, guidance_scale)
            codes[:, index] = sample(logits, uniforms[:, index], temperature, top_k, top_p)
            if callback is not None:
                replaced = callback(index, codes[:, : index + 1])
                if replaced is not None:
                    codes[:, : index + 1] = replaced
            if index + 1 < num_codes:
                step_input = codes[:, index : index + 1]
                step_input = step_input.repeat(2, 1) if guided else step_input.clone()
                with self._freezing():
                    logits = self._step(step_input, cache, attention_mask)
        if not logits.isfinite().all():  # once, since asking stalls the device; what is not finite stays so
            raise ValueError(f"The logits are not finite in {model.dtype}; use bfloat16 or float32.")
        return codes
