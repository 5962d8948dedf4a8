"""The decoding loop: from a condition to a grid of codes, one code per step."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch._inductor.config
import torch.nn.functional as F
from transformers import StaticCache

from ..loading.compile_cache import keep_compiled_code
from ..loading.offloading import is_offloaded
from .filled_cache import FilledCache
from .modeling import LlamaGenForConditionalGeneration
from .sampling import SamplingParams, guide, is_guided, sample


class CodeDecoder:
    """Generates codes with a [`LlamaGenForConditionalGeneration`], at static shapes.

    The keys and values of all layers live in a cache of fixed size. The next call with the same batch size reuses it;
    concurrent calls have a cache each. The condition is read eagerly. After it, each code takes one call of a step
    whose shapes never change, and which [`compile`] turns into a single graph.

    Args:
        model ([`LlamaGenForConditionalGeneration`]): In evaluation mode.
    """

    def __init__(self, model: LlamaGenForConditionalGeneration):
        self.model = model
        self._spare_caches: dict[tuple, StaticCache] = {}
        self._step = self._eager_step
        self._freezes = False

    def compile(self, **kwargs) -> None:
        """Compile the step for one code, with `fullgraph=True`.

        The first call with each batch size then takes a minute or so. Each batch size has its own graph; torch allows
        eight (`torch._dynamo.config.recompile_limit`).

        Args:
            kwargs: Passed to `torch.compile`. The default on an accelerator is CUDA graphs. On a CPU it is weights
                frozen into the graph and the fastest of several kernels. Frozen weights ignore later changes, so
                compile last. Code is kept for the next process, see
                [`~llamagen_hf.loading.compile_cache.keep_compiled_code`]. A graph with frozen weights is traced anew
                there, which takes a good part of the time; `mode="default"` starts several times as fast, and its
                steps are slower.
        """
        keep_compiled_code()
        self._freezes = False  # an earlier call may have set it
        if not kwargs.keys() & {"mode", "options"}:
            if self.model.device.type == "cpu":
                kwargs["options"] = {"max_autotune": True}
                self._freezes = True
            else:
                kwargs["mode"] = "reduce-overhead"
        self._step = torch.compile(self._eager_step, **{"fullgraph": True, "dynamic": False, **kwargs})

    @property
    def is_compiled(self) -> bool:
        """Whether the step is compiled."""
        return self._step != self._eager_step

    def _eager_step(self, codes, cache, attention_mask) -> torch.Tensor:
        output = self.model(
            input_ids=codes, past_key_values=cache, attention_mask=attention_mask, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1]

    @contextmanager
    def _static_cache(self, rows: int, length: int, device: torch.device) -> Iterator[StaticCache]:
        # Tensors created in inference mode can't be updated outside it.
        kind = FilledCache if device.type == "cpu" and not self.is_compiled else StaticCache
        key = (kind, rows, length, self.model.dtype, device, torch.is_inference_mode_enabled())
        cache = self._spare_caches.pop(key, None)
        self._spare_caches.clear()  # free caches of other sizes before allocating
        if cache is None:
            cache = kind(config=self.model.config, max_cache_len=length)
        else:
            cache.reset()
        try:
            yield cache
        finally:
            self._spare_caches[key] = cache

    def _freezing(self) -> AbstractContextManager:
        # This is not an option of torch.compile: the tracer, which makes weights constants, reads the global setting.
        return torch._inductor.config.patch(freezing=True) if self._freezes else nullcontext()

    def __call__(self, uniforms: torch.Tensor, **kwargs) -> torch.LongTensor:
        """Generate all codes of a batch of images. Arguments and errors are those of [`stream`].

        Returns:
            `torch.LongTensor` of shape `(batch, codes)`: The codes in raster order.
        """
        (codes,) = deque(self.stream(uniforms, **kwargs), maxlen=1)
        return codes

    @torch.no_grad()
    def stream(
        self,
        uniforms: torch.Tensor,
        class_ids: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        prefix_codes: torch.LongTensor | None = None,
        **sampling: float,
    ) -> Generator[torch.LongTensor, float | None, None]:
        """Generate the codes of a batch of images one after the other.

        Args:
            uniforms (`torch.Tensor` of shape `(batch, codes)`):
                Random numbers in [0, 1), one per code, on the device that the model runs on.
            class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): Input ids of the classes, class mode.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Left-padded text encoder states, text mode.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, condition_length)`, *optional*): 0 for padding.
            prefix_codes (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                The first n < `codes` codes, which are kept; the others are drawn with the random numbers they would
                have without. They are read in one go with the condition.
            sampling: Fields of [`~llamagen_hf.llamagen.sampling.SamplingParams`]; without them codes are drawn from
                the logits as they are.

        Yields:
            `torch.LongTensor` of shape `(batch, i)`: The codes so far in raster order, after each new code. The caller
            may change the tensor in place, but only a change of its last column affects the following codes. The
            caller may send back another `guidance_scale` if guidance was on at the start.

        Raises:
            ValueError: If the logits overflow, as they may in float16; if the step is compiled and the weights are
                offloaded; or if a sent `guidance_scale` turns on guidance that was off at the start.
        """
        model, config = self.model, self.model.config
        if self.is_compiled and is_offloaded(model):
            raise ValueError("The weights are offloaded, which a compiled step can't be: use one or the other.")
        # The model's own device is meaningless while its weights are offloaded.
        (batch, num_codes), device = uniforms.shape, uniforms.device
        in_own_precision = torch.autocast(device.type, enabled=False)
        params = SamplingParams(**sampling).filled()
        guidance_scale = params.guidance_scale
        guided = guidance_scale != 1
        if prefix_codes is None:
            prefix_codes = torch.empty(batch, 0, dtype=torch.long, device=device)
        first = prefix_codes.shape[1]
        codes = torch.empty(batch, num_codes, dtype=torch.long, device=device)
        codes[:, :first] = prefix_codes
        if guided:
            prefix_codes = prefix_codes.repeat(2, 1)

        if prompt_embeds is not None:
            condition_length = prompt_embeds.shape[1]
            if prompt_attention_mask is None:
                prompt_attention_mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=device)
            if guided:
                null = model.model.uncond_embedding(batch).to(prompt_embeds)
                with in_own_precision:
                    prompt_embeds = torch.cat([prompt_embeds, null])
                prompt_attention_mask = prompt_attention_mask.repeat(2, 1)
            condition = {"prompt_embeds": prompt_embeds}
            if first:
                condition["input_ids"] = prefix_codes
        else:
            condition_length = 1
            if guided:
                class_ids = torch.cat([class_ids, torch.full_like(class_ids, config.null_class_id)])
            condition = {"input_ids": torch.cat([class_ids[:, None], prefix_codes], dim=1)}

        length = -(-(condition_length + num_codes) // 8) * 8  # attention kernels are faster at multiples of 8
        attention_mask = None
        if prompt_attention_mask is not None:
            attention_mask = F.pad(prompt_attention_mask, (0, length - condition_length), value=1)

        with self._static_cache(2 * batch if guided else batch, length, device) as cache:
            with in_own_precision:
                logits = model(
                    **condition, past_key_values=cache, attention_mask=attention_mask, use_cache=True, logits_to_keep=1
                ).logits[:, -1]
            for index in range(first, num_codes):
                if guided:
                    conditional, unconditional = logits.chunk(2)
                    logits = conditional
                    if guidance_scale != 1 and is_guided(index, params.guidance_interval):
                        logits = guide(conditional, unconditional, guidance_scale)
                with in_own_precision:
                    codes[:, index] = sample(
                        logits, uniforms[:, index], params.temperature, params.top_k, params.top_p
                    )
                if index + 1 == num_codes and not logits.isfinite().all():
                    # Checked once, since the check stalls the device. Values that are not finite stay so.
                    raise ValueError(f"The logits are not finite in {model.dtype}; use bfloat16 or float32.")
                changed_scale = yield codes[:, : index + 1]
                if changed_scale is not None:
                    if changed_scale != 1 and not guided:
                        raise ValueError("Guidance was off at the start, so it can't be turned on now.")
                    guidance_scale = changed_scale
                if index + 1 < num_codes:
                    step_input = codes[:, index : index + 1]
                    step_input = step_input.repeat(2, 1) if guided else step_input.clone()
                    with self._freezing(), in_own_precision:
                        logits = self._step(step_input, cache, attention_mask)
