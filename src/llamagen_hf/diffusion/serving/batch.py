"""Images of pixel diffusion for many clients: those that are drawn alike share the steps of the U-Net."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.utils import logging

from ...outputs import GenerationStep
from ...serving.engine import EngineRequest
from ...serving.local_engine import Progress
from ...serving.waiting_queue import WaitingQueue
from ..pipeline import PixelDiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class DiffusionRequest(EngineRequest):
    """One image to draw: all that determines it.

    The values are not checked here, but by [`~llamagen_hf.diffusion.preparation.PreparationMixin.check`].

    Args:
        prompt_embeds (`torch.Tensor` of shape `(condition_length, condition_dim)`): Text states, or an embedding.
        prompt_attention_mask (`torch.LongTensor` of shape `(condition_length,)`): 0 for padding.
        negative_prompt_embeds (`torch.Tensor` of the shape of `prompt_embeds`, *optional*):
            What guidance leads away from, by default zeros.
        num_inference_steps (`int`): Steps from noise to image.
        guidance_scale (`float`): Strength of guidance.
        shows_previews (`bool`, *optional*, defaults to `False`): Whether the latents of a step show the image so far.
    """

    prompt_embeds: torch.Tensor
    prompt_attention_mask: torch.LongTensor
    negative_prompt_embeds: torch.Tensor | None = None
    num_inference_steps: int
    guidance_scale: float
    shows_previews: bool = False

    @property
    def settings(self) -> dict:
        """What images that share the steps of the U-Net have in common."""
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}


class DiffusionBatch:
    """Draws images group by group. A group has the same settings, and starts and ends together.

    On a CPU a group is one image: a larger one would save nothing, and its size changes the last bits. The latents of
    a step are the image as it is predicted there, or `None` if the request shows no previews; the last one is the
    image.

    Args:
        pipe ([`PixelDiffusionPipeline`]): Draws them. It needs no text encoder.
        slots (`int`, *optional*, defaults to 64): Rows of the U-Net's input: an image takes one, or two if guided.
    """

    def __init__(self, pipe: PixelDiffusionPipeline, slots: int = 64):
        self.pipe, self.slots = pipe, slots
        self.waiting = WaitingQueue(spacing=max(1, slots // 2))
        self._names: list[str | None] = []  # of the images that are drawn; `None` where one was cancelled
        self._shows_previews: list[bool] = []
        self._steps: Iterator[GenerationStep] = iter(())

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        slots: int = 64,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int | None = None,
    ) -> "DiffusionBatch":
        """Load the U-Net and its scheduler.

        Args:
            folder (`str`): Folder of the pipeline.
            slots (`int`, *optional*, defaults to 64): See [`DiffusionBatch`].
            device (`str`, *optional*, defaults to `"cpu"`): Device of the U-Net.
            dtype (`str`, *optional*, defaults to `"float32"`): Type of its weights: float32, float16 or bfloat16.
            threads (`int`, *optional*): Number of torch's threads on a CPU.

        Raises:
            OSError, ValueError: If it can't be loaded.
        """
        logging.disable_progress_bar()
        if threads is not None:
            torch.set_num_threads(threads)
        pipe = PixelDiffusionPipeline.from_pretrained(
            folder, text_encoder=None, tokenizer=None, dtype=getattr(torch, dtype)
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.to(device)
        return cls(pipe, slots)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to draw."""
        return not self._is_drawing and not self.waiting

    @property
    def _is_drawing(self) -> bool:
        return any(name is not None for name in self._names)

    @property
    def statistics(self) -> dict[str, int]:
        """Images that are drawn ("drawing") and images that wait."""
        return {"drawing": len(self._names) - self._names.count(None), "waiting": len(self.waiting)}

    def add(self, name: str, request: DiffusionRequest) -> None:
        """Draw an image, under a name that no other one here has."""
        self.waiting.add(name, request)

    def cancel(self, name: str) -> None:
        """Drop an image. Nothing happens if there is none of this name."""
        self.waiting.discard(name)
        self._names = [None if each == name else each for each in self._names]

    def step(self) -> Progress:
        """Take one step with each image that is drawn, or with a new group if there is none."""
        if not self._is_drawing:
            self._start()
        progress = Progress()
        step = next(self._steps)
        is_last = step.output is not None
        for row, name in enumerate(self._names):
            if name is not None:
                shown = is_last or self._shows_previews[row]
                progress.latents[name].append(step.images[row] if shown else None)
                if is_last:
                    progress.finished.add(name)
        if is_last:
            self._names = []
        return progress

    def _start(self) -> None:
        """Let the images that have waited longest, and are drawn alike, be the next group."""
        first, group = self.waiting.first(), []
        rows = 1 if first.guidance_scale == 1 else 2
        size = 1 if self.pipe.device.type == "cpu" else max(1, self.slots // rows)
        while len(group) < size and (request := self.waiting.first()) is not None:
            if request.settings != first.settings:
                break
            group.append(self.waiting.pop())
        self._names = [name for name, _ in group]
        requests = [request for _, request in group]
        self._shows_previews = [request.shows_previews for request in requests]
        negative = [request.negative_prompt_embeds for request in requests]
        self._steps = self.pipe.stream(
            prompt_embeds=torch.stack([request.prompt_embeds for request in requests]),
            prompt_attention_mask=torch.stack([request.prompt_attention_mask for request in requests]),
            negative_prompt_embeds=None if negative[0] is None else torch.stack(negative),
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            **first.settings,
        )
