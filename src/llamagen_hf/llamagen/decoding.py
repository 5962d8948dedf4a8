"""The decoding loop: from a condition to a grid of codes, one code per step or several."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from ..loading.compilation import check_compiler, keep_compiled_code
from ..loading.offloading import is_offloaded
from .filled_cache import FilledCache
from .kv_cache import SlotCache, cache_length
from .modeling import LlamaGenForConditionalGeneration
from .packaged_step import PackagedStep
from .sampling import SamplingParams, guide, is_guided, sample
from .windows import CodeWindows


# Codes that a step of each window makes final, on the average over images of the emoji checkpoint, one at a time; see
# benchmarks/windows.py.
CODES_PER_STEP = {1: 1.0, 4: 1.41, 8: 1.57, 16: 1.63}


def measure(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes: the shortest of three, after one that counts for nothing."""
    call()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class CodeDecoder:
    """Generates codes with a [`LlamaGenForConditionalGeneration`], at static shapes.

    The keys and values of all layers live in a cache of fixed size. The next call with the same batch size reuses it;
    concurrent calls have a cache each. The condition is read eagerly. After it, each code takes one call of a step
    whose shapes never change, and which [`compile`] turns into a single graph. With a decoding window, a step draws
    several codes.

    Args:
        model ([`LlamaGenForConditionalGeneration`]): In evaluation mode.
    """

    def __init__(self, model: LlamaGenForConditionalGeneration):
        self.model = model
        self._spare_caches: dict[tuple, StaticCache | SlotCache] = {}
        self._fastest_windows: dict[tuple, int] = {}
        self._step, self._window_step = self._eager_step, self._eager_window_step
        self._is_packaged = False  # whether both are a `PackagedStep`, which takes windows, of one code too

    def compile(self, **kwargs) -> None:
        """Compile the step, with `fullgraph=True`.

        The first call with each batch size and window then takes a minute or so. The code is kept for the next
        process, see [`~llamagen_hf.loading.compilation.keep_compiled_code`].

        On a CPU, the weights are by default frozen into the code, and the fastest of several kernels is taken. Frozen
        weights ignore later changes, so compile last.

        Args:
            kwargs: Passed to `torch.compile`, which allows eight batch sizes and windows
                (`torch._dynamo.config.recompile_limit`). The default on an accelerator is CUDA graphs. On a CPU,
                `mode="default"` compiles several times as fast as the default, and its steps are slower.

        Raises:
            ValueError: If it is to be compiled for a CPU, and a C++ compiler or Python's headers are missing.
        """
        if "backend" not in kwargs:
            check_compiler(self.model.device)
        keep_compiled_code()
        self._fastest_windows.clear()
        self._is_packaged = not kwargs and self.model.device.type == "cpu" and self._has_windows
        if self._is_packaged:
            self._window_step = self._step = PackagedStep(self.model, self._eager_window_step)
            return
        if not kwargs.keys() & {"mode", "options"} and self.model.device.type != "cpu":
            kwargs["mode"] = "reduce-overhead"
        kwargs = {"fullgraph": True, "dynamic": False, **kwargs}
        self._step = torch.compile(self._eager_step, **kwargs)
        self._window_step = torch.compile(self._eager_window_step, **kwargs)

    @property
    def is_compiled(self) -> bool:
        """Whether the step is compiled."""
        return self._step != self._eager_step

    def _eager_step(self, codes, cache, attention_mask) -> torch.Tensor:
        output = self.model(
            input_ids=codes, past_key_values=cache, attention_mask=attention_mask, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1]

    def _eager_window_step(self, codes: torch.LongTensor, cache: SlotCache) -> torch.Tensor:
        """Logits `(rows, width, V)` of the codes after each of `codes` `(rows, width)`."""
        positions, mask = cache.window(*codes.shape)
        output = self.model(
            input_ids=codes, past_key_values=cache, attention_mask=mask, position_ids=positions, use_cache=True
        )
        return output.logits

    @contextmanager
    def _spare(self, kind: type, rows: int, device: torch.device) -> Iterator[StaticCache | SlotCache]:
        """A cache of this kind, which nobody else uses meanwhile."""
        config, dtype = self.model.config, self.model.dtype
        # Tensors created in inference mode can't be updated outside it.
        key = (kind, rows, dtype, device, torch.is_inference_mode_enabled())
        cache = self._spare_caches.pop(key, None)
        self._spare_caches.clear()  # free caches of other sizes before allocating
        if cache is None and kind is SlotCache:
            cache = SlotCache(config, rows, dtype, device)
        elif cache is None:
            cache = kind(config=config, max_cache_len=cache_length(config))
        elif kind is not SlotCache:
            cache.reset()
        try:
            yield cache
        finally:
            self._spare_caches[key] = cache

    @torch.no_grad()
    def resolve_window(self, window: int | Literal["auto"], rows: int, device: torch.device) -> int:
        """The decoding window itself, or for `"auto"` the one that takes the least time.

        That is measured at the first call with this number of rows, and compiled if the step is.

        Args:
            window (`int` or `"auto"`): Codes of an image that a step may draw.
            rows (`int`): Images, twice as many if they are guided.
            device (`torch.device`): Device that the model runs on.
        """
        if window != "auto":
            return window
        key = (rows, self.model.dtype, device)
        if key not in self._fastest_windows and self._has_windows:
            seconds = {}
            with self._spare(SlotCache, rows, device) as cache:
                for width, codes_per_step in CODES_PER_STEP.items():
                    codes = torch.zeros(rows, min(width, self.model.config.num_codes), dtype=torch.long, device=device)
                    with torch.autocast(device.type, enabled=False):
                        seconds[width] = measure(partial(self._window_step, codes, cache), device) / codes_per_step
            self._fastest_windows[key] = min(seconds, key=seconds.get)
        return self._fastest_windows.get(key, 1)

    @property
    def _has_windows(self) -> bool:
        return self.model.config._attn_implementation in ("eager", "sdpa")

    def __call__(self, noise_keys: torch.LongTensor, **kwargs) -> torch.LongTensor:
        """Generate all codes of a batch of images. Arguments and errors are those of [`stream`].

        Returns:
            `torch.LongTensor` of shape `(batch, codes)`: The codes in raster order.
        """
        (codes,) = deque(self.stream(noise_keys, **kwargs), maxlen=1)
        return codes

    @torch.no_grad()
    def stream(
        self,
        noise_keys: torch.LongTensor,
        class_ids: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        prefix_codes: torch.LongTensor | None = None,
        decoding_window: int = 1,
        **sampling: float,
    ) -> Generator[torch.LongTensor, float | None, None]:
        """Generate the codes of a batch of images one after the other.

        Args:
            noise_keys (`torch.LongTensor` of shape `(batch,)`):
                Keys of the images' noise, on the device that the model runs on. See
                [`~llamagen_hf.llamagen.noise.draw_noise_keys`].
            class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): Input ids of the classes, class mode.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Left-padded text encoder states, text mode.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, condition_length)`, *optional*): 0 for padding.
            prefix_codes (`torch.LongTensor` of shape `(batch, n)`, *optional*):
                The first n codes, fewer than all, which are kept; the others are drawn with the noise they would have
                without. They are read in one go with the condition.
            decoding_window (`int`, *optional*, defaults to 1):
                Codes of an image that a step may draw, see [`~llamagen_hf.llamagen.windows.CodeWindows`]. In float32
                they are the same codes, up to rounding, which in half precision changes some of them.
            sampling: Fields of [`~llamagen_hf.llamagen.sampling.SamplingParams`]; without them codes are drawn from
                the logits as they are.

        Yields:
            `torch.LongTensor` of shape `(batch, i)`: The codes so far in raster order, after each new code. The caller
            may change the tensor in place, but only a change of its last column affects the following codes. The
            caller may send back another `guidance_scale` if guidance was on at the start.

        Raises:
            ValueError: If the logits overflow, as they may in float16; if the step is compiled and the weights are
                offloaded; if the model's attention has no windows; or if a sent `guidance_scale` turns on guidance
                that was off at the start.
        """
        model, config = self.model, self.model.config
        if self.is_compiled and is_offloaded(model):
            raise ValueError("The weights are offloaded, which a compiled step can't be: use one or the other.")
        # The model's own device is meaningless while its weights are offloaded.
        batch, num_codes, device = len(noise_keys), config.num_codes, noise_keys.device
        params = SamplingParams(**sampling).filled()
        guided, first = params.guidance_scale != 1, 0 if prefix_codes is None else prefix_codes.shape[1]
        codes = torch.zeros(batch, num_codes, dtype=torch.long, device=device)
        if first:
            codes[:, :first] = prefix_codes
        with torch.autocast(device.type, enabled=False):
            given = class_ids, prompt_embeds, prompt_attention_mask
            condition, mask = self._condition(*given, codes[:, :first], guided)
        if decoding_window > 1 and not self._has_windows:
            raise ValueError(
                f"With attention {config._attn_implementation!r} a step draws one code: leave out `decoding_window`, "
                "or load the model with attn_implementation='sdpa'."
            )
        width = min(decoding_window, num_codes - 1)
        by_windows = width > 1 or (width == 1 and self._is_packaged)
        loop = partial(self._stream_windows, width) if by_windows else self._stream_codes
        yield from loop(codes, first, noise_keys, condition, mask, params)

    def _condition(
        self, class_ids, prompt_embeds, prompt_attention_mask, prefix_codes: torch.LongTensor, guided: bool
    ) -> tuple[dict, torch.LongTensor | None]:
        """What the model reads before the first step, for both streams if it is guided, and the mask of the words."""
        if guided:
            prefix_codes = prefix_codes.repeat(2, 1)
        if prompt_embeds is None:
            if guided:
                class_ids = torch.cat([class_ids, torch.full_like(class_ids, self.model.config.null_class_id)])
            return {"input_ids": torch.cat([class_ids[:, None], prefix_codes], dim=1)}, None
        if prompt_attention_mask is None:
            prompt_attention_mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=prompt_embeds.device)
        if guided:
            null = self.model.model.uncond_embedding(len(prompt_embeds)).to(prompt_embeds)
            prompt_embeds = torch.cat([prompt_embeds, null])
            prompt_attention_mask = prompt_attention_mask.repeat(2, 1)
        condition = {"prompt_embeds": prompt_embeds}
        if prefix_codes.shape[1]:
            condition["input_ids"] = prefix_codes
        return condition, prompt_attention_mask

    def _stream_codes(
        self,
        codes: torch.LongTensor,
        first: int,
        keys: torch.LongTensor,
        condition: dict,
        mask: torch.LongTensor | None,
        params: SamplingParams,
    ) -> Generator[torch.LongTensor, float | None, None]:
        """Draw one code a step into `codes`, from index `first` on."""
        num_codes, condition_length, scale = codes.shape[1], self.model.config.condition_length, params.guidance_scale
        guided, in_own_precision = scale != 1, torch.autocast(codes.device.type, enabled=False)
        if mask is not None:
            mask = F.pad(mask, (0, cache_length(self.model.config) - condition_length), value=1)
        rows = 2 * len(codes) if guided else len(codes)
        kind = FilledCache if codes.device.type == "cpu" and not self.is_compiled else StaticCache
        with self._spare(kind, rows, codes.device) as cache:
            with in_own_precision:
                logits = self.model(
                    **condition, past_key_values=cache, attention_mask=mask, use_cache=True, logits_to_keep=1
                ).logits[:, -1]
            for index in range(first, num_codes):
                with in_own_precision:
                    logits = _mix(logits, index, scale, params.guidance_interval, guided)
                    codes[:, index] = sample(logits, keys, index, params.temperature, params.top_k, params.top_p)
                if index + 1 == num_codes:
                    self._check_finite(logits)
                sent = yield codes[:, : index + 1]
                scale = _checked_scale(sent, scale, guided)
                if index + 1 < num_codes:
                    step_input = codes[:, index : index + 1]
                    step_input = step_input.repeat(2, 1) if guided else step_input.clone()
                    with in_own_precision:
                        logits = self._step(step_input, cache, mask)

    def _stream_windows(
        self,
        width: int,
        codes: torch.LongTensor,
        first: int,
        keys: torch.LongTensor,
        condition: dict,
        mask: torch.LongTensor | None,
        params: SamplingParams,
    ) -> Generator[torch.LongTensor, float | None, None]:
        """Draw up to `width` codes a step into `codes`, from index `first` on."""
        config, num_codes, scale = self.model.config, codes.shape[1], params.guidance_scale
        guided, in_own_precision = scale != 1, torch.autocast(codes.device.type, enabled=False)
        filters = params.temperature, params.top_k, params.top_p
        repeated = keys.repeat_interleave(width)
        rows = 2 * len(codes) if guided else len(codes)
        with self._spare(SlotCache, rows, codes.device) as cache:
            with in_own_precision:
                read = DynamicCache(config=config)
                words = {} if mask is None else {"prompt_attention_mask": mask}
                logits = self.model(**condition, **words, past_key_values=read, use_cache=True, logits_to_keep=1)
                cache.fill(slice(0, rows), read, mask)
                logits = _mix(logits.logits[:, -1], first, scale, params.guidance_interval, guided)
                codes[:, first] = sample(logits, keys, first, *filters)
            windows, index = CodeWindows(codes, first + 1, width, config.grid_size), first
            while True:
                num_final = int(windows.num_final.min())
                if num_final == num_codes:
                    self._check_finite(logits)
                while index < num_final:
                    drawn = codes[:, index].clone()
                    sent = yield codes[:, : index + 1]
                    index += 1
                    changed_scale = _checked_scale(sent, scale, guided)
                    if changed_scale != scale or not torch.equal(drawn, codes[:, index - 1]):
                        windows.roll_back(index)
                        num_final, scale = index, changed_scale
                if index == num_codes:
                    return
                read, inputs = windows.guess(), windows.inputs
                positions = config.condition_length + inputs[:, 0]
                cache.positions.copy_(positions.repeat(2) if guided else positions)
                with in_own_precision:
                    logits = self._window_step(read.repeat(2, 1) if guided else read, cache)
                    logits = _mix(logits, inputs + 1, scale, params.guidance_interval, guided)
                    drawn = sample(logits.flatten(0, 1), repeated, (inputs + 1).flatten(), *filters)
                windows.update(drawn.view_as(inputs))

    def _check_finite(self, logits: torch.Tensor) -> None:
        # Checked once, since the check stalls the device. Values that are not finite stay so.
        if not logits.isfinite().all():
            raise ValueError(f"The logits are not finite in {self.model.dtype}; use bfloat16 or float32.")


def _mix(
    logits: torch.Tensor, indices: int | torch.LongTensor, scale: float, interval: int, guided: bool
) -> torch.Tensor:
    """The logits of codes from those of both streams, if there are two.

    Args:
        logits (`torch.Tensor` of shape `(rows, V)` or `(rows, width, V)`): Those with the condition, then without.
        indices (`int` or `torch.LongTensor` of shape `(batch, width)`): Indices of the codes.
        scale (`float`): Guidance scale.
        interval (`int`): See [`is_guided`].
        guided (`bool`): Whether there are two streams.
    """
    if not guided:
        return logits
    conditional, unconditional = logits.chunk(2)
    if scale == 1:
        return conditional
    which = is_guided(indices, interval)
    if isinstance(which, bool):
        return guide(conditional, unconditional, scale) if which else conditional
    return torch.where(which[..., None], guide(conditional, unconditional, scale), conditional)


def _checked_scale(sent: float | None, scale: float, guided: bool) -> float:
    """The guidance scale from now on."""
    if sent is not None and sent != 1 and not guided:
        raise ValueError("Guidance was off at the start, so it can't be turned on now.")
    return scale if sent is None else sent
