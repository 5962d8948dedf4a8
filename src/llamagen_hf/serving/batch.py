"""Continuous batching: pictures join and leave a running batch between the codes.

transformers has continuous batching of its own, `ContinuousBatchingManager` behind `generate_batch`. As of 5.23 it
can't carry these drawings:

- Guidance mixes the logits of two streams of one picture. Its scheduler knows requests of one stream each, and may
  admit or preempt one of the two alone; its logits processors see rows one by one.
- It draws with one `torch.multinomial` for all rows, from torch's global generator: a picture would depend on its
  neighbours, and a seed would mean nothing.
- A request is a list of token ids. A text condition is a prefix of states, padded on the left.
- A request can change temperature, top-k and top-p only where the generation config has a processor for them from the
  start.

So the batch here is the pipeline's own loop, [`~llamagen_hf.decoding.CodeDecoder`], with a row for each stream.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from ..modeling import LlamaGenForConditionalGeneration
from ..sampling import guide, is_guided, sample
from .admission import WaitingLine
from .engine import DrawingRequest
from .slots import SlotCache


@dataclass
class Picture:
    """A picture in the batch: what was asked for, its codes so far, and its rows."""

    name: str
    request: DrawingRequest
    uniforms: torch.Tensor
    codes: list[int]
    rows: list[int] = field(default_factory=list)  # the conditional stream, and the unconditional one if there is one

    @property
    def needs_guidance(self) -> bool:
        """Whether the next code needs the unconditional stream. If one does not, none after it does."""
        return needs_guidance(self.request, len(self.codes))


def needs_guidance(request: DrawingRequest, index: int) -> bool:
    return request.guidance_scale != 1 and is_guided(index, request.guidance_interval)


@dataclass
class Progress:
    """What a step brought: for each picture its new codes, or why it can't be drawn."""

    codes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, str] = field(default_factory=dict)


class ContinuousBatch:
    """Draws pictures side by side, each as the pipeline draws it alone.

    A picture takes a slot of the cache, or two as long as it is guided. Slots in use are the first ones, and a step
    runs over them, rounded up to a power of two; so there are few shapes, and [`compile`] makes a graph for each.

    Args:
        model ([`LlamaGenForConditionalGeneration`]): In evaluation mode.
        slots (`int`, *optional*, defaults to 64): Streams drawn at once, at least two.
        prefill_positions (`int`, *optional*, defaults to 512):
            Positions of new pictures that are read between two codes of the others, at least those of one picture. It
            bounds how long the others stand still when many join.
    """

    def __init__(self, model: LlamaGenForConditionalGeneration, slots: int = 64, prefill_positions: int = 512):
        self.model, self.slots, self.prefill_positions = model, slots, prefill_positions
        self.cache = SlotCache(model.config, slots, model.dtype, model.device)
        self.waiting = WaitingLine(spacing=max(1, slots // 2))
        self.pictures: dict[str, Picture] = {}
        self._streams: list[tuple[Picture, int]] = []  # for each row in use its picture, and which of its streams
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
        return not self.pictures and not self.waiting

    @property
    def rows_in_use(self) -> int:
        """Slots that are taken."""
        return len(self._streams)

    def add(self, name: str, request: DrawingRequest) -> None:
        """Draw a picture from one of the next steps on.

        Args:
            name (`str`): Unlike that of any other picture here.
            request ([`DrawingRequest`]): What to draw.
        """
        self.waiting.add(name, request)

    def cancel(self, name: str) -> None:
        """Leave a picture undone; nothing happens if there is none of this name, or none any more."""
        self.waiting.discard(name)
        if name in self.pictures:
            self._remove(self.pictures[name])

    @torch.no_grad()
    def step(self) -> Progress:
        """Let pictures in that wait, as far as there is room, and draw one code of each."""
        progress = Progress()
        for pictures in self._admit():
            self._draw(pictures, self._prefill(pictures), progress)
        if self._streams:
            rows = min(1 << (len(self._streams) - 1).bit_length(), self.slots)
            codes, positions = torch.zeros(2, rows, dtype=torch.long)
            for row, (picture, _) in enumerate(self._streams):
                codes[row] = picture.codes[-1]
                positions[row] = self.model.config.condition_length + len(picture.codes) - 1
            self.cache.positions[:rows] = positions.to(self.model.device)
            logits = self._step(codes[:, None].to(self.model.device))
            pictures = list(self.pictures.values())
            conditional = logits[[picture.rows[0] for picture in pictures]]
            guided = [i for i, picture in enumerate(pictures) if len(picture.rows) == 2]
            unconditional = logits[[pictures[i].rows[1] for i in guided]]
            self._draw(pictures, (conditional, guided, unconditional), progress)
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

    def _admit(self) -> list[list[Picture]]:
        """Those who join now; pictures that are read together have as many codes to keep as each other."""
        free, budget = self.slots - len(self._streams), self.prefill_positions
        joining = defaultdict(list)
        while (request := self.waiting.first()) is not None:
            streams = 2 if needs_guidance(request, len(request.prefix_codes)) else 1
            positions = streams * (self.model.config.condition_length + len(request.prefix_codes))
            if streams > free or (positions > budget and joining):
                break
            free, budget = free - streams, budget - positions
            name, request = self.waiting.pop()
            picture = Picture(name, request, request.uniforms(self.model.config.num_codes), list(request.prefix_codes))
            joining[len(request.prefix_codes)].append(picture)
        return list(joining.values())

    def _prefill(self, pictures: list[Picture]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        """Read conditions and kept codes into slots; logits as [`_draw`] takes them."""
        config, device = self.model.config, self.model.device
        guided = [i for i, picture in enumerate(pictures) if picture.needs_guidance]
        streams = [(picture, 0) for picture in pictures] + [(pictures[i], 1) for i in guided]
        requests = [picture.request for picture, _ in streams]
        inputs = {"input_ids": torch.tensor([picture.codes for picture, _ in streams], device=device).long()}
        mask = None
        if config.conditioning == "text":
            embeds = torch.stack([request.prompt_embeds for request in requests]).to(device, self.model.dtype)
            embeds[len(pictures) :] = self.model.model.uncond_embedding(len(guided)).to(embeds)
            mask = torch.stack([request.prompt_attention_mask for request in requests]).to(device)
            inputs |= {"prompt_embeds": embeds, "prompt_attention_mask": mask}
            if inputs["input_ids"].shape[1] == 0:
                del inputs["input_ids"]
        else:
            class_ids = [request.class_id for request in requests[: len(pictures)]]
            class_ids = torch.tensor(class_ids + [config.null_class_id] * len(guided), device=device)
            inputs["input_ids"] = torch.cat([class_ids[:, None], inputs["input_ids"]], dim=1)

        cache = DynamicCache(config=config)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        first = len(self._streams)
        self.cache.fill(slice(first, first + len(streams)), cache, mask)
        for row, (picture, stream) in enumerate(streams, start=first):
            picture.rows.append(row)
            self._streams.append((picture, stream))
            self.pictures[picture.name] = picture
        return logits[: len(pictures)], guided, logits[len(pictures) :]

    def _draw(
        self,
        pictures: list[Picture],
        logits: tuple[torch.Tensor, list[int], torch.Tensor],
        progress: Progress,
    ) -> None:
        """Draw a code of each picture; those that are done leave.

        Args:
            pictures (`list[Picture]`): Any of those in the batch.
            logits (`tuple`): Their conditional logits `(pictures, V)`, the indices of those that are guided, and the
                unconditional logits `(guided, V)` of these.
            progress ([`Progress`]): Takes the codes.
        """
        logits, guided, unconditional = logits
        requests = [picture.request for picture in pictures]
        if guided:
            scales = torch.tensor([[requests[i].guidance_scale] for i in guided], dtype=torch.float32)
            rows = torch.tensor(guided, device=logits.device)
            mixed = guide(logits[rows], unconditional, scales.to(logits.device))
            logits = logits.index_copy(0, rows, mixed)
        codes = sample(
            logits,
            torch.stack([picture.uniforms[len(picture.codes)] for picture in pictures]).to(logits.device),
            torch.tensor([request.temperature for request in requests], dtype=torch.float32),
            torch.tensor([request.top_k for request in requests]),
            torch.tensor([request.top_p for request in requests], dtype=torch.float32),
        ).tolist()
        last = [i for i, picture in enumerate(pictures) if len(picture.codes) + 1 == self.model.config.num_codes]
        # What is not finite stays so, as in the pipeline: asked once a picture.
        is_finite = dict(zip(last, logits[last].isfinite().all(-1).tolist(), strict=True)) if last else {}
        for index, (picture, code) in enumerate(zip(pictures, codes, strict=True)):
            picture.codes.append(code)
            if not is_finite.get(index, True):
                progress.codes.pop(picture.name, None)
                progress.failures[picture.name] = (
                    f"The logits are not finite in {self.model.dtype}; use bfloat16 or float32."
                )
            else:
                progress.codes[picture.name].append(code)
            if index in is_finite:
                self._remove(picture)
            elif len(picture.rows) == 2 and not picture.needs_guidance:
                self._free(picture.rows.pop())

    def _remove(self, picture: Picture) -> None:
        del self.pictures[picture.name]
        while picture.rows:
            self._free(picture.rows.pop())

    def _free(self, row: int) -> None:
        """Give a slot back; the last one takes its place."""
        picture, stream = self._streams.pop()
        last = len(self._streams)
        if row != last:
            self.cache.move(last, row)
            self._streams[row] = (picture, stream)
            picture.rows[stream] = row
