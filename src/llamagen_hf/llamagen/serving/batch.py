"""Continuous batching: images join and leave a running batch between the codes.

transformers has continuous batching of its own, `ContinuousBatchingManager` behind `generate_batch`. As of 5.23 it
can't carry these drawings:

- Guidance mixes the logits of two streams of one image. Its scheduler knows requests of one stream each, and may
  admit or preempt one of the two alone; its logits processors see rows one by one.
- It draws with one `torch.multinomial` for all rows, from torch's global generator: an image would depend on its
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
from transformers import DynamicCache

from ...serving.engine import GenerationRequest
from ..modeling import LlamaGenForConditionalGeneration
from ..sampling import guide, is_guided, sample
from .kv_cache import SlotCache
from .scheduler import WaitingLine


@dataclass
class Image:
    """An image in the batch: what was asked for, its codes so far, and its rows."""

    name: str
    request: GenerationRequest
    uniforms: torch.Tensor
    codes: list[int]
    rows: list[int] = field(default_factory=list)  # the conditional stream, and the unconditional one if there is one

    @property
    def needs_guidance(self) -> bool:
        """Whether the next code needs the unconditional stream. If one does not, none after it does."""
        return needs_guidance(self.request, len(self.codes))


def needs_guidance(request: GenerationRequest, index: int) -> bool:
    return request.guidance_scale != 1 and is_guided(index, request.guidance_interval)


@dataclass
class Progress:
    """What a step brought: for each image its new codes, or why it can't be drawn."""

    codes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, str] = field(default_factory=dict)


class ContinuousBatch:
    """Draws images side by side, each as the pipeline draws it alone.

    An image takes a slot of the cache, or two as long as it is guided. Slots in use are the first ones, and a step
    runs over them, rounded up to a power of two; so there are few shapes, and [`compile`] makes a graph for each.

    Args:
        model ([`LlamaGenForConditionalGeneration`]): In evaluation mode.
        slots (`int`, *optional*, defaults to 64): Streams drawn at once, at least two.
        prefill_positions (`int`, *optional*, defaults to 512):
            Positions of new images that are read between two codes of the others, at least those of one image. It
            bounds how long the others stand still when many join.
    """

    def __init__(self, model: LlamaGenForConditionalGeneration, slots: int = 64, prefill_positions: int = 512):
        self.model, self.slots, self.prefill_positions = model, slots, prefill_positions
        self.cache = SlotCache(model.config, slots, model.dtype, model.device)
        self.waiting = WaitingLine(spacing=max(1, slots // 2))
        self.images: dict[str, Image] = {}
        self._streams: list[tuple[Image, int]] = []  # for each row in use its image, and which of its streams
        self._positions = torch.arange(self.cache.length, device=model.device)
        self._step = self._eager_step

    def compile(self, **kwargs) -> None:
        """Compile the step, `fullgraph=True`; each number of rows gets a graph when it first occurs.

        Args:
            kwargs: For `torch.compile`. By default CUDA graphs on an accelerator.
        """
        if not kwargs.keys() & {"mode", "options"} and self.model.device.type != "cpu":
            kwargs["mode"] = "reduce-overhead"
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, self.slots.bit_length() + 1)
        self._step = torch.compile(self._eager_step, **{"fullgraph": True, "dynamic": False, **kwargs})

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.images and not self.waiting

    @property
    def rows_in_use(self) -> int:
        """Slots that are taken."""
        return len(self._streams)

    def add(self, name: str, request: GenerationRequest) -> None:
        """Draw an image from one of the next steps on.

        Args:
            name (`str`): Unlike that of any other image here.
            request ([`GenerationRequest`]): What to draw.
        """
        self.waiting.add(name, request)

    def cancel(self, name: str) -> None:
        """Leave an image undone; nothing happens if there is none of this name, or none any more."""
        self.waiting.discard(name)
        if name in self.images:
            self._remove(self.images[name])

    @torch.no_grad()
    def step(self) -> Progress:
        """Let images in that wait, as far as there is room, and draw one code of each."""
        progress = Progress()
        for images in self._admit():
            self._draw(images, self._prefill(images), progress)
        if self._streams:
            rows = min(1 << (len(self._streams) - 1).bit_length(), self.slots)
            codes, positions = torch.zeros(2, rows, dtype=torch.long)
            for row, (image, _) in enumerate(self._streams):
                codes[row] = image.codes[-1]
                positions[row] = self.model.config.condition_length + len(image.codes) - 1
            self.cache.positions[:rows] = positions.to(self.model.device)
            logits = self._step(codes[:, None].to(self.model.device))
            images = list(self.images.values())
            conditional = logits[[image.rows[0] for image in images]]
            guided = [i for i, image in enumerate(images) if len(image.rows) == 2]
            unconditional = logits[[images[i].rows[1] for i in guided]]
            self._draw(images, (conditional, guided, unconditional), progress)
        return progress

    def _eager_step(self, codes: torch.LongTensor) -> torch.Tensor:
        rows = len(codes)
        positions = self.cache.positions[:rows, None]
        output = self.model(
            input_ids=codes,
            attention_mask=self.cache.visible[:rows] & (self._positions <= positions),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _admit(self) -> list[list[Image]]:
        """Those who join now; images that are read together have as many codes to keep as each other."""
        free, budget = self.slots - len(self._streams), self.prefill_positions
        joining = defaultdict(list)
        while (request := self.waiting.first()) is not None:
            streams = 2 if needs_guidance(request, len(request.prefix_codes)) else 1
            positions = streams * (self.model.config.condition_length + len(request.prefix_codes))
            if streams > free or (positions > budget and joining):
                break
            free, budget = free - streams, budget - positions
            name, request = self.waiting.pop()
            image = Image(name, request, request.uniforms(self.model.config.num_codes), list(request.prefix_codes))
            joining[len(request.prefix_codes)].append(image)
        return list(joining.values())

    def _prefill(self, images: list[Image]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """Read conditions and kept codes into slots; logits as [`_draw`] takes them."""
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
        images: list[Image],
        logits: tuple[torch.Tensor, list[int], torch.Tensor],
        progress: Progress,
    ) -> None:
        """Draw a code of each image; those that are done leave.

        Args:
            images (`list[Image]`): Any of those in the batch.
            logits (`tuple`): Their conditional logits `(images, V)`, the indices of those that are guided, and the
                unconditional logits `(guided, V)` of these.
            progress ([`Progress`]): Takes the codes.
        """
        logits, guided, unconditional = logits
        requests = [image.request for image in images]
        if guided:
            scales = torch.tensor([[requests[i].guidance_scale] for i in guided], dtype=torch.float32)
            rows = torch.tensor(guided, device=logits.device)
            mixed = guide(logits[rows], unconditional, scales.to(logits.device))
            logits = logits.index_copy(0, rows, mixed)
        codes = sample(
            logits,
            torch.stack([image.uniforms[len(image.codes)] for image in images]).to(logits.device),
            torch.tensor([request.temperature for request in requests], dtype=torch.float32),
            torch.tensor([request.top_k for request in requests]),
            torch.tensor([request.top_p for request in requests], dtype=torch.float32),
        ).tolist()
        last = [i for i, image in enumerate(images) if len(image.codes) + 1 == self.model.config.num_codes]
        # What is not finite stays so, as in the pipeline: asked once an image.
        is_finite = dict(zip(last, logits[last].isfinite().all(-1).tolist(), strict=True)) if last else {}
        for index, (image, code) in enumerate(zip(images, codes, strict=True)):
            image.codes.append(code)
            if not is_finite.get(index, True):
                progress.codes.pop(image.name, None)
                progress.failures[image.name] = (
                    f"The logits are not finite in {self.model.dtype}; use bfloat16 or float32."
                )
            else:
                progress.codes[image.name].append(code)
            if index in is_finite:
                self._remove(image)
            elif len(image.rows) == 2 and not image.needs_guidance:
                self._free(image.rows.pop())

    def _remove(self, image: Image) -> None:
        del self.images[image.name]
        while image.rows:
            self._free(image.rows.pop())

    def _free(self, row: int) -> None:
        """Give a slot back; the last one takes its place."""
        image, stream = self._streams.pop()
        last = len(self._streams)
        if row != last:
            self.cache.move(last, row)
            self._streams[row] = (image, stream)
            image.rows[stream] = row
