"""What an engine is: it generates many images at once, step by step, and each request sees only its own."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any


logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a dead engine is started again; doubled each time
ATTEMPTS = 5  # failed starts in a row after which the engine gives up


class EngineDied(Exception):
    """The engine died, and the images that it was generating are lost."""


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """One image to generate. Each family adds its conditions and settings.

    Args:
        seed (`int`): Seed of the image's own generator.
        place (`int`, *optional*, defaults to 0):
            Index of the image within its client's request. An engine that is fair to all clients lets the first
            images of each request go first.
        finishing (`Any`, *optional*): What the frontend keeps of the request for itself. The engine does not get it.
    """

    seed: int
    place: int = 0
    finishing: Any = None


class Engine(ABC):
    """Generates images. All methods belong to the event loop that called [`start`].

    Args:
        restarts (`bool`, *optional*, defaults to `True`): Whether to start again after it died.

    Attributes:
        is_ready (`bool`): Whether it takes requests now. An engine that died may come back.
        capacity (`int`): Roughly how many images it generates at once.
        deaths (`int`): How often it died.
        has_given_up (`bool`): Whether it died and does not come back.
    """

    is_ready: bool = False
    capacity: int

    def __init__(self, restarts: bool = True):
        self.restarts, self.deaths, self.has_given_up = restarts, 0, False

    @abstractmethod
    async def start(self) -> None:
        """Load the model.

        Raises:
            OSError, ValueError, EngineDied: If the model can't be loaded.
        """

    @abstractmethod
    async def stop(self) -> None:
        """End at once. Images that are being generated are lost."""

    @property
    def statistics(self) -> dict[str, float]:
        """Numbers for the metrics, by name."""
        return {"deaths": self.deaths}

    @abstractmethod
    def generate(self, request: EngineRequest) -> AsyncIterator[list]:
        """Generate one image.

        This is an asynchronous generator: closing it, or cancelling the task that waits for it, cancels the image.

        Yields:
            `list`: The latents of the steps since the last time, one for each. From the first ones the family's
            frontend decodes a partial image, from all of them the final image.

        Raises:
            EngineDied: If the engine is not ready, or dies meanwhile.
            ValueError: If the image can't be generated.
        """

    async def recover(self, start: Callable[[], Awaitable[None]]) -> None:
        """Count a death and, if it `restarts`, try several starts with longer and longer pauses before them."""
        self.deaths += 1
        logger.error("engine died", extra={"deaths": self.deaths})
        pause = FIRST_PAUSE
        for _ in range(ATTEMPTS if self.restarts else 0):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            try:
                await start()
            except (OSError, ValueError, EngineDied) as error:
                logger.error("engine does not start", extra={"reason": str(error)})
            else:
                logger.info("engine started again")
                return
        self.has_given_up = True
