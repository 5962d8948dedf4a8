"""Continuous batching: images join and leave a running batch between the codes.

transformers has continuous batching of its own, `ContinuousBatchingManager` behind `generate_batch`. As of 5.23 it
can't generate these images:

- Guidance mixes the logits of two streams of one image. Its scheduler knows requests of one stream each, and may
  admit or preempt one of the two alone. Its logits processors see rows one by one.
- It draws with one `torch.multinomial` for all rows, from torch's global generator. An image would depend on its
  neighbours, and a seed would mean nothing.
- A request is a list of token ids. A text condition is a prefix of states, padded on the left.
- A request can change temperature, top-k and top-p only where the generation config has a processor for them from the
  start.

So the batch here is the pipeline's own loop, [`~llamagen_hf.llamagen.decoding.CodeDecoder`], with a row for
each stream.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
import transformers
from transformers import DynamicCache

from ...loading.compilation import check_compiler, keep_compiled_code
from ...loading.quantization import quantize_components
from ...serving.engine import EngineRequest
from ...serving.local_engine import Progress
from ...serving.waiting_queue import WaitingQueue
from ..configuration import LlamaGenConfig
from ..kv_cache import SlotCache
from ..modeling import LlamaGenForConditionalGeneration
from ..noise import draw_noise_keys
from ..sampling import SamplingParams, guide, is_guided, sample
from ..windows import CodeWindows


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(SamplingParams, EngineRequest):
    """One image to generate: all that determines its codes.

    The values are not checked here, but by [`~llamagen_hf.llamagen.inputs.GenerationInputs`].

    Args:
        seed (`int`): Seed of the image's own generator.
        class_id (`int`, *optional*): Input id of the class, for class-conditional checkpoints.
        prompt_embeds (`torch.Tensor` of shape `(condition_length, condition_dim)`, *optional*):
            Text states, padded on the left, for text-conditional checkpoints.
        prompt_attention_mask (`torch.LongTensor` of shape `(condition_length,)`, *optional*): 0 for padding.
        prefix_codes (`list[int]`, *optional*): The first codes, which are kept.
        place (`int`, *optional*, defaults to 0): See [`~llamagen_hf.serving.engine.EngineRequest`].
        kwargs: As for [`~llamagen_hf.llamagen.sampling.SamplingParams`]; without them codes are drawn from the logits
            as they are.
    """

    class_id: int | None = None
    prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.LongTensor | None = None
    prefix_codes: list[int] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self.fill()

    @property
    def noise_key(self) -> int:
        """The key of the noise that the pipeline would draw the image with."""
        return draw_noise_keys(1, torch.Generator().manual_seed(self.seed), torch.device("cpu")).item()

    def needs_guidance(self, index: int) -> bool:
        """Whether code `index` needs the unconditional stream. If one does not, no later one does."""
        return self.guidance_scale != 1 and is_guided(index, self.guidance_interval)


@dataclass
class ActiveImage:
    """An image in the batch: its request, its codes so far with those that are kept, and its slots."""

    name: str
    request: GenerationRequest
    noise_key: int
    codes: list[int]
    rows: list[int] = field(default_factory=list)  # the conditional stream and, if it is guided, the unconditional
    windows: CodeWindows | None = None

    @property
    def needs_guidance(self) -> bool:
        """Whether the next code needs the unconditional stream."""
        return self.request.needs_guidance(len(self.codes))

    def windows_after(self, width: int, config: LlamaGenConfig) -> CodeWindows:
        """The window after the codes so far, with the guesses of the last one if there was one."""
        if self.windows is None:
            codes = torch.zeros(1, config.num_codes, dtype=torch.long)
            self.windows = CodeWindows(codes, len(self.codes), width, config.grid_size)
        # Steps of one code may have come between.
        self.windows.codes[0, : len(self.codes)] = torch.tensor(self.codes)
        self.windows.num_final.fill_(len(self.codes))
        return self.windows


class ContinuousBatch:
    """Generates images side by side, each as the pipeline generates it alone.

    An image takes a slot of the cache, or two as long as it is guided. The slots in use are the first ones, and a step
    runs over them, rounded up to a power of two. So there are few shapes, and [`compile`] makes a graph for each.

    Args:
        model ([`LlamaGenForConditionalGeneration`]): The generator, in evaluation mode.
        slots (`int`, *optional*, defaults to 64): Streams at once, at least two.
        prefill_positions (`int`, *optional*, defaults to 512):
            Positions of new images that are read between two codes of the others, at least those of one image. It
            bounds how long the others wait when many join.
        decoding_window (`int`, *optional*, defaults to 1):
            Codes of an image that a step may draw as long as all streams together read at most as many codes as there
            are slots. In float32 the images are the same, up to rounding.
    """

    def __init__(
        self,
        model: LlamaGenForConditionalGeneration,
        slots: int = 64,
        prefill_positions: int = 512,
        decoding_window: int = 1,
    ):
        self.model, self.slots, self.prefill_positions = model, slots, prefill_positions
        self.decoding_window = decoding_window
        self.cache = SlotCache(model.config, slots, model.dtype, model.device)
        self.waiting = WaitingQueue(spacing=max(1, slots // 2))
        self.images: dict[str, ActiveImage] = {}
        self._streams: list[tuple[ActiveImage, int]] = []  # for each row in use its image, and which of its streams
        self._positions = torch.arange(self.cache.length, device=model.device)
        self._step = self._eager_step

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        slots: int = 64,
        device: str = "cpu",
        dtype: str = "float32",
        compile: bool = False,
        threads: int | None = None,
        decoding_window: int = 1,
        quantization: str | None = None,
    ) -> "ContinuousBatch":
        """Load the generator.

        Args:
            folder (`str`): Folder of the generator: a checkpoint's `transformer`.
            slots (`int`, *optional*, defaults to 64): See [`ContinuousBatch`].
            device (`str`, *optional*, defaults to `"cpu"`): Device of the generator.
            dtype (`str`, *optional*, defaults to `"float32"`): Type of its weights: float32, float16 or bfloat16.
            compile (`bool`, *optional*, defaults to `False`): Whether to compile the step.
            threads (`int`, *optional*): Number of torch's threads on a CPU.
            decoding_window (`int`, *optional*, defaults to 1): See [`ContinuousBatch`].
            quantization (`str`, *optional*): Mode of [`~llamagen_hf.loading.quantization.quantize_components`].

        Raises:
            OSError, ValueError: If it can't be loaded.
        """
        transformers.utils.logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        options = {"dtype": getattr(torch, dtype)}
        if quantization is not None:
            options["quantization_config"] = quantize_components({"": quantization}).quant_mapping[""]
        model = LlamaGenForConditionalGeneration.from_pretrained(folder, **options)
        batch = cls(model.to(device).eval(), slots, decoding_window=decoding_window)
        if compile:
            batch.compile()
        return batch

    def compile(self, **kwargs) -> None:
        """Compile the step, `fullgraph=True`; each number of rows, and window, gets a graph when it first occurs.

        Args:
            kwargs: For `torch.compile`. By default CUDA graphs on an accelerator.

        Raises:
            ValueError: If it is to be compiled for a CPU, and a C++ compiler or Python's headers are missing.
        """
        check_compiler(self.model.device)
        keep_compiled_code()
        if not kwargs.keys() & {"mode", "options"} and self.model.device.type != "cpu":
            kwargs["mode"] = "reduce-overhead"
        graphs = 2 * self.slots.bit_length() + 1
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, graphs)
        self._step = torch.compile(self._eager_step, **{"fullgraph": True, "dynamic": False, **kwargs})

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to generate."""
        return not self.images and not self.waiting

    @property
    def statistics(self) -> dict[str, int]:
        """Images in the batch ("drawing"), images that wait, and slots in use ("rows")."""
        return {"drawing": len(self.images), "waiting": len(self.waiting), "rows": len(self._streams)}

    def add(self, name: str, request: GenerationRequest) -> None:
        """Generate an image from one of the next steps on.

        Args:
            name (`str`): A name that no other image here has.
            request ([`GenerationRequest`]): What to generate.
        """
        self.waiting.add(name, request)

    def cancel(self, name: str) -> None:
        """Drop an image. Nothing happens if there is none of this name."""
        self.waiting.discard(name)
        if name in self.images:
            self._remove(self.images[name])

    @torch.no_grad()
    def step(self) -> Progress:
        """Admit waiting images as far as there is room, and draw a code of each image, or several."""
        progress = Progress()
        for images in self._admit():
            self._draw(images, self._prefill(images), progress)
        width = min(self.decoding_window, self.model.config.num_codes - 1)
        if width > 1 and 0 < len(self._streams) * width <= self.slots:
            self._draw_windows(width, progress)
        elif self._streams:
            rows = min(1 << (len(self._streams) - 1).bit_length(), self.slots)
            codes, positions = torch.zeros(2, rows, dtype=torch.long)
            for row, (image, _) in enumerate(self._streams):
                codes[row] = image.codes[-1]
                positions[row] = self.model.config.condition_length + len(image.codes) - 1
            self.cache.positions[:rows] = positions.to(self.model.device)
            logits = self._step(codes[:, None].to(self.model.device))
            images = list(self.images.values())
            self._draw(images, self._of_streams(images, logits[:, -1]), progress)
        return progress

    def _eager_step(self, codes: torch.LongTensor) -> torch.Tensor:
        """Logits `(rows, width, V)` of the codes after each of `codes` `(rows, width)`."""
        rows, width = codes.shape
        if width > 1:
            positions, mask = self.cache.window(rows, width)
        else:
            positions = self.cache.positions[:rows, None]
            mask = self.cache.visible[:rows] & (self._positions <= positions)
        output = self.model(
            input_ids=codes, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        return output.logits

    def _admit(self) -> list[list[ActiveImage]]:
        """The images that join now, grouped by their number of codes to keep: each group is read together."""
        free, budget = self.slots - len(self._streams), self.prefill_positions
        joining = defaultdict(list)
        while (request := self.waiting.first()) is not None:
            streams = 2 if request.needs_guidance(len(request.prefix_codes)) else 1
            positions = streams * (self.model.config.condition_length + len(request.prefix_codes))
            if streams > free or (positions > budget and joining):
                break
            free, budget = free - streams, budget - positions
            name, request = self.waiting.pop()
            kept = list(request.prefix_codes)
            joining[len(kept)].append(ActiveImage(name, request, request.noise_key, kept))
        return list(joining.values())

    def _prefill(self, images: list[ActiveImage]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """Read conditions and kept codes into slots. Returns logits as [`_draw`] takes them."""
        config, device = self.model.config, self.model.device
        guided = [i for i, image in enumerate(images) if image.needs_guidance]
        streams = [(image, 0) for image in images] + [(images[i], 1) for i in guided]
        requests = [image.request for image, _ in streams]
        inputs = {"input_ids": torch.tensor([image.codes for image, _ in streams], device=device).long()}
        mask = None
        if config.conditioning == "text":
            embeds = torch.stack([request.prompt_embeds for request in requests]).to(device, self.model.dtype)
            embeds[len(images) :] = self.model.model.uncond_embedding(len(guided)).to(embeds)
            mask = torch.stack([request.prompt_attention_mask for request in requests]).to(device)
            inputs |= {"prompt_embeds": embeds, "prompt_attention_mask": mask}
            if inputs["input_ids"].shape[1] == 0:
                del inputs["input_ids"]
        else:
            class_ids = [request.class_id for request in requests[: len(images)]]
            class_ids = torch.tensor(class_ids + [config.null_class_id] * len(guided), device=device)
            inputs["input_ids"] = torch.cat([class_ids[:, None], inputs["input_ids"]], dim=1)

        cache = DynamicCache(config=config)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        first = len(self._streams)
        self.cache.fill(slice(first, first + len(streams)), cache, mask)
        for row, (image, stream) in enumerate(streams, start=first):
            image.rows.append(row)
            self._streams.append((image, stream))
            self.images[image.name] = image
        return logits[: len(images)], guided, logits[len(images) :]

    def _draw(
        self,
        images: list[ActiveImage],
        logits: tuple[torch.Tensor, list[int], torch.Tensor],
        progress: Progress,
    ) -> None:
        """Draw a code of each image. Images that are complete leave the batch.

        Args:
            images (`list[ActiveImage]`): Any of those in the batch.
            logits (`tuple`): Their conditional logits `(images, V)`, the indices of those that are guided, and the
                unconditional logits `(guided, V)` of these.
            progress ([`Progress`]): Where the codes go.
        """
        indices = torch.tensor([[len(image.codes)] for image in images], device=logits[0].device)
        logits = logits[0][:, None], logits[1], logits[2][:, None]
        codes, logits = self._sample(images, logits, indices)
        last = [i for i, image in enumerate(images) if len(image.codes) + 1 == self.model.config.num_codes]
        # Logits that are not finite stay so, as in the pipeline, so the last ones tell.
        is_finite = dict(zip(last, logits[last].isfinite().all(-1).all(-1).tolist(), strict=True)) if last else {}
        for index, (image, new) in enumerate(zip(images, codes.tolist(), strict=True)):
            self._take(image, new, is_finite.get(index, True), progress)

    def _draw_windows(self, width: int, progress: Progress) -> None:
        """Draw several codes of each image, see [`~llamagen_hf.llamagen.windows.CodeWindows`]."""
        config, device, images = self.model.config, self.model.device, list(self.images.values())
        rows = 1 << (len(self._streams) - 1).bit_length()
        codes, positions = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        windows = [image.windows_after(width, config) for image in images]
        for image, window in zip(images, windows, strict=True):
            codes[image.rows] = window.guess()
            positions[image.rows] = config.condition_length + window.inputs[0, 0]
        self.cache.positions[:rows] = positions.to(device)
        logits = self._of_streams(images, self._step(codes.to(device)))
        indices = torch.cat([window.inputs for window in windows]) + 1
        drawn, logits = self._sample(images, logits, indices.to(device))
        is_finite = logits.isfinite().flatten(1).all(1).tolist()
        for image, window, new, finite in zip(images, windows, drawn.cpu(), is_finite, strict=True):
            window.update(new[None])
            self._take(image, window.codes[0, len(image.codes) : int(window.num_final)].tolist(), finite, progress)

    def _of_streams(
        self, images: list[ActiveImage], logits: torch.Tensor
    ) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """The logits of a step `(rows, ...)` as [`_draw`] takes them."""
        guided = [i for i, image in enumerate(images) if len(image.rows) == 2]
        return logits[[image.rows[0] for image in images]], guided, logits[[images[i].rows[1] for i in guided]]

    def _sample(
        self, images: list[ActiveImage], logits: tuple[torch.Tensor, list[int], torch.Tensor], indices: torch.Tensor
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Codes `(images, width)` and the logits that they were drawn from, which are `(images, width, V)`."""
        logits, guided, unconditional = logits
        requests, width = [image.request for image in images], indices.shape[1]
        if guided:
            scales = torch.tensor([requests[i].guidance_scale for i in guided], dtype=torch.float32)
            rows = torch.tensor(guided, device=logits.device)
            mixed = guide(logits[rows], unconditional, scales.to(logits.device)[:, None, None])
            # A window may reach beyond the codes that are guided.
            which = [[requests[i].needs_guidance(index) for index in indices[i].tolist()] for i in guided]
            mixed = torch.where(torch.tensor(which, device=logits.device)[..., None], mixed, logits[rows])
            logits = logits.index_copy(0, rows, mixed)
        codes = sample(
            logits.flatten(0, 1),
            torch.tensor([image.noise_key for image in images], device=logits.device).repeat_interleave(width),
            indices.flatten(),
            torch.tensor([request.temperature for request in requests], dtype=torch.float32).repeat_interleave(width),
            torch.tensor([request.top_k for request in requests]).repeat_interleave(width),
            torch.tensor([request.top_p for request in requests], dtype=torch.float32).repeat_interleave(width),
        )
        return codes.view_as(indices), logits

    def _take(self, image: ActiveImage, codes: list[int], is_finite: bool, progress: Progress) -> None:
        """Add codes to an image, which leaves the batch if it is complete."""
        image.codes.extend(codes)
        is_complete = len(image.codes) == self.model.config.num_codes
        if is_complete and not is_finite:
            progress.latents.pop(image.name, None)
            progress.failures[image.name] = (
                f"The logits are not finite in {self.model.dtype}; use bfloat16 or float32."
            )
        else:
            progress.latents[image.name].extend(codes)
            if is_complete:
                progress.finished.add(image.name)
        if is_complete:
            self._remove(image)
        elif len(image.rows) == 2 and not image.needs_guidance:
            self._free(image.rows.pop())

    def _remove(self, image: ActiveImage) -> None:
        del self.images[image.name]
        while image.rows:
            self._free(image.rows.pop())

    def _free(self, row: int) -> None:
        """Free a slot. The last one moves there."""
        image, stream = self._streams.pop()
        last = len(self._streams)
        if row != last:
            self.cache.move(last, row)
            self._streams[row] = (image, stream)
            image.rows[stream] = row
