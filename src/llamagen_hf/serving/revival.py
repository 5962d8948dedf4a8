"""New starts of an engine that died."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from .engine import EngineDied


logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before an engine that died is started again; doubled each time
ATTEMPTS = 5  # starts in a row that come to nothing, after which it is given up


async def start_again(start: Callable[[], Awaitable[None]]) -> bool:
    """Whether one of several starts, with longer and longer pauses before them, comes to something."""
    pause = FIRST_PAUSE
    for _ in range(ATTEMPTS):
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
        try:
            await start()
        except (OSError, ValueError, EngineDied) as error:
            logger.error("engine does not start", extra={"reason": str(error)})
        else:
            logger.info("engine started again")
            return True
    return False
