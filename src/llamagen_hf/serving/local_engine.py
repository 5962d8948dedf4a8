"""`LocalEngine`: continuous batching on this machine, in a process of its own."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from multiprocessing.connection import Connection

from .engine import Engine, EngineDied, GenerationRequest
from .engine_process import EngineSettings, pack, spawn
from .revival import start_again


logger = logging.getLogger(__name__)


class LocalEngine(Engine):
    """The generator in a process of its own, so that whatever ends that process leaves the server standing.

    Args:
        settings ([`EngineSettings`]): What to load.
        num_codes (`int`): Codes of an image.
        restarts (`bool`, *optional*, defaults to `True`): Whether to start again when the process dies.
    """

    def __init__(self, settings: EngineSettings, num_codes: int, restarts: bool = True):
        self.settings, self.num_codes, self.restarts = settings, num_codes, restarts
        self.process = None
        self.deaths = 0
        self._is_ready = self._has_given_up = self._is_stopping = False
        self._statistics: dict[str, float] = {}
        self._drawings: dict[str, asyncio.Queue] = {}
        self._names = count()
        self._connection: Connection | None = None
        self._restart: asyncio.Task | None = None

    @property
    def is_ready(self) -> bool:
        return self._is_ready

    @property
    def has_given_up(self) -> bool:
        return self._has_given_up

    @property
    def capacity(self) -> int:
        return max(1, self.settings.slots // 2)

    @property
    def statistics(self) -> dict[str, float]:
        return self._statistics | {"deaths": self.deaths}

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.process, self._connection = await asyncio.to_thread(spawn, self.settings)
        try:
            kind, sentence = await asyncio.to_thread(self._connection.recv)
        except (EOFError, OSError) as error:
            await asyncio.to_thread(self.process.join)
            raise EngineDied(f"The engine's process ended with code {self.process.exitcode}.") from error
        if kind == "failed":
            raise ValueError(sentence)
        # A pipe takes as much as fits and then waits, for as long as a step takes.
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="engine-sender")
        threading.Thread(target=self._receive, args=(self._connection,), name="engine-receiver", daemon=True).start()
        self._is_ready = True

    async def stop(self) -> None:
        self._is_stopping = True
        if self._restart is not None:
            self._restart.cancel()
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.join)

    def _receive(self, connection: Connection) -> None:
        """Hand messages to the event loop until the process is gone."""
        try:
            while True:
                _, progress = connection.recv()
                self._loop.call_soon_threadsafe(self._deliver, *progress)
        except (EOFError, OSError):
            pass
        try:
            self._loop.call_soon_threadsafe(self._died)
        except RuntimeError:  # the loop is closed
            pass

    def _deliver(self, codes: dict[str, list[int]], failures: dict[str, str], statistics: dict[str, float]) -> None:
        self._statistics = statistics
        for name, drawn in codes.items():
            if name in self._drawings:  # else it was cancelled meanwhile
                self._drawings[name].put_nowait(drawn)
        for name, sentence in failures.items():
            if name in self._drawings:
                self._drawings[name].put_nowait(ValueError(sentence))

    def _died(self) -> None:
        self._is_ready = False
        self._statistics = {}
        self._sender.shutdown(wait=False, cancel_futures=True)
        self._connection.close()
        for drawing in self._drawings.values():
            drawing.put_nowait(EngineDied("The engine died while it drew; try again."))
        if self._is_stopping:
            return
        self.deaths += 1
        logger.error("engine died", extra={"deaths": self.deaths})
        if self.restarts:
            self._restart = asyncio.ensure_future(self._start_again())
        else:
            self._has_given_up = True

    async def _start_again(self) -> None:
        self._has_given_up = not await start_again(self.start)

    def _send(self, *message) -> None:
        try:
            self._sender.submit(self._connection.send, message)
        except RuntimeError:  # shut down: the process is gone, and whoever draws is told
            pass

    async def draw(self, request: GenerationRequest) -> AsyncIterator[list[int]]:
        if not self._is_ready:
            raise EngineDied("The engine is not ready.")
        name, queue = str(next(self._names)), asyncio.Queue()
        self._drawings[name] = queue
        self._send("draw", name, pack(request))
        left = self.num_codes - len(request.prefix_codes)
        try:
            while left:
                codes = await queue.get()
                if isinstance(codes, Exception):
                    left = 0
                    raise codes
                left -= len(codes)
                yield codes
        finally:
            del self._drawings[name]
            if left:
                self._send("cancel", name)
