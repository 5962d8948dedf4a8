"""What an engine is: it draws codes for many requests at once, and each of them sees only its own."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import torch

from ..llamagen.sampling import draw_uniforms


class EngineDied(Exception):
    """The engine is gone, and the drawing with it."""


@dataclass
class GenerationRequest:
    """One image to draw: all that determines its codes.

    Nothing is checked here; [`~llamagen_hf.llamagen.inputs.GenerationInputs`] does that.

    Args:
        seed (`int`): Of the image's own generator.
        class_id (`int`, *optional*): Input id of the class, class mode.
        prompt_embeds (`torch.Tensor` of shape `(condition_length, condition_dim)`, *optional*):
            Text states, padded on the left, text mode.
        prompt_attention_mask (`torch.LongTensor` of shape `(condition_length,)`, *optional*): 0 for padding.
        prefix_codes (`list[int]`, *optional*): The first codes, which are kept.
        guidance_scale (`float`, *optional*, defaults to 1.0): 1 draws without the unconditional stream.
        guidance_interval (`int`, *optional*, defaults to -1): See [`~llamagen_hf.llamagen.sampling.is_guided`].
        temperature, top_k, top_p: See [`~llamagen_hf.llamagen.sampling.sample`].
        place (`int`, *optional*, defaults to 0):
            Which image this is of those that were asked for together; an engine that is fair to all lets the first
            ones go first.
    """

    seed: int
    class_id: int | None = None
    prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.LongTensor | None = None
    prefix_codes: list[int] = field(default_factory=list)
    guidance_scale: float = 1.0
    guidance_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    place: int = 0

    def uniforms(self, num_codes: int) -> torch.Tensor:
        """The random numbers `(num_codes,)` that the pipeline would draw the image with."""
        return draw_uniforms(1, num_codes, [torch.Generator().manual_seed(self.seed)], torch.device("cpu"))[0]


class Engine(ABC):
    """Draws codes. All methods belong to the event loop that called [`start`]."""

    @abstractmethod
    async def start(self) -> None:
        """Load the model and be ready.

        Raises:
            OSError, ValueError, EngineDied: In one sentence, if that can't be.
        """

    @abstractmethod
    async def stop(self) -> None:
        """End at once; what is being drawn is lost."""

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it draws now. An engine that died may come back."""

    @property
    @abstractmethod
    def has_given_up(self) -> bool:
        """Whether it died and won't come back."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Images that it draws at once, roughly."""

    @property
    def statistics(self) -> dict[str, float]:
        """Numbers that the metrics show, by name."""
        return {}

    @abstractmethod
    def draw(self, request: GenerationRequest) -> AsyncIterator[list[int]]:
        """Draw one image.

        An asynchronous generator: closing it, or cancelling the task that waits for it, cancels the drawing.

        Yields:
            `list[int]`: The codes that were drawn since the last time, the kept ones not among them.

        Raises:
            EngineDied: If the engine is not ready, or dies on the way.
            ValueError: In one sentence, if the image can't be drawn.
        """
