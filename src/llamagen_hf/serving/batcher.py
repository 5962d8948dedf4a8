"""Dynamic batching of what runs in a thread beside the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Batcher:
    """Calls a function of a list in a thread of its own. Items that arrive while it is busy are processed together.

    Args:
        function (`Callable`): Takes a list of items and returns a list of as many results.
        name (`str`): Name of the thread.
        max_size (`int`, *optional*, defaults to 32): Items of one call.
    """

    def __init__(self, function: Callable[[list], list], name: str, max_size: int = 32):
        self.function, self.max_size = function, max_size
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._worker: asyncio.Task | None = None

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    async def __call__(self, item: Any) -> Any:
        """The result for one item."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._worker is None:
            self._worker = asyncio.ensure_future(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch = []
            while self._waiting and len(batch) < self.max_size:
                item, future = self._waiting.popleft()
                if not future.done():  # else the caller was cancelled
                    batch.append((item, future))
            try:
                await self._run(batch)
            except Exception:  # one item failed; the others must not
                for pair in batch:
                    try:
                        await self._run([pair])
                    except Exception as error:
                        if not pair[1].done():
                            pair[1].set_exception(error)
        self._worker = None

    async def _run(self, batch: list[tuple[Any, asyncio.Future]]) -> None:
        items = [item for item, _ in batch]
        results = await asyncio.get_running_loop().run_in_executor(self._thread, self.function, items)
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
