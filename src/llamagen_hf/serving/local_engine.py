"""`LocalEngine`: continuous batching on this machine, in a process of its own."""

import asyncio
import multiprocessing
import pickle
import signal
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Protocol

from .engine import Engine, EngineDied, EngineRequest


@dataclass
class Progress:
    """What one step of a batch did.

    Args:
        latents (`dict[str, list]`): New latents of each image, by its name.
        finished (`set[str]`): Images whose latents are complete.
        failures (`dict[str, str]`): Why images can't be generated. They have left the batch.
    """

    latents: dict[str, list] = field(default_factory=lambda: defaultdict(list))
    finished: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)


class Batch(Protocol):
    """What a family generates its images in, many at once."""

    is_idle: bool  # whether there is nothing to generate
    statistics: dict[str, float]  # numbers for the metrics
    add: Callable[[str, EngineRequest], None]  # generate an image, under a name that no other image here has
    cancel: Callable[[str], None]  # drop an image, if there is one of this name
    step: Callable[[], Progress]  # take one step with each image


class LocalEngine(Engine):
    """Runs a batch in a process of its own, so that the server survives whatever ends that process.

    Args:
        load (`functools.partial`):
            Loads a [`Batch`] in the engine's process. It is pickled, and raises an `OSError` or a `ValueError` if the
            model can't be loaded.
        capacity (`int`): Roughly how many images the batch generates at once.
        restarts (`bool`, *optional*, defaults to `True`): Whether to start again when the process dies.
    """

    def __init__(self, load: partial[Batch], capacity: int, restarts: bool = True):
        super().__init__(restarts)
        self.load, self.capacity = load, capacity
        self.process: BaseProcess | None = None
        self._is_stopping = False
        self._statistics: dict[str, float] = {}
        self._queues: dict[str, asyncio.Queue] = {}
        self._names = count()
        self._connection: Connection | None = None
        self._recovery: asyncio.Task | None = None

    @property
    def statistics(self) -> dict[str, float]:
        return self._statistics | super().statistics

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.process, self._connection = await asyncio.to_thread(spawn, self.load)
        try:
            failure = await asyncio.to_thread(self._connection.recv)
        except (EOFError, OSError) as error:
            await asyncio.to_thread(self.process.join)
            raise EngineDied(f"The engine's process ended with code {self.process.exitcode}.") from error
        if failure is not None:
            raise ValueError(failure)
        # Sending waits, for as long as a step takes, whenever the pipe is full.
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="engine-sender")
        threading.Thread(target=self._receive, args=(self._connection,), name="engine-receiver", daemon=True).start()
        self.is_ready = True

    async def stop(self) -> None:
        self._is_stopping = True
        if self._recovery is not None:
            self._recovery.cancel()
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.join)

    def _receive(self, connection: Connection) -> None:
        """Hand messages to the event loop until the process ends."""
        try:
            while True:
                self._loop.call_soon_threadsafe(self._deliver, *connection.recv())
        except (EOFError, OSError):
            pass
        try:
            self._loop.call_soon_threadsafe(self._died)
        except RuntimeError:  # the loop is closed
            pass

    def _deliver(self, progress: Progress, statistics: dict[str, float]) -> None:
        self._statistics = statistics
        reports = [*progress.latents.items(), *((name, None) for name in progress.finished)]
        for name, report in reports + [(name, ValueError(text)) for name, text in progress.failures.items()]:
            if name in self._queues:  # else it was cancelled meanwhile
                self._queues[name].put_nowait(report)

    def _died(self) -> None:
        self.is_ready = False
        self._statistics = {}
        self._sender.shutdown(wait=False, cancel_futures=True)
        self._connection.close()
        for queue in self._queues.values():
            queue.put_nowait(EngineDied("The engine died while it generated the image; try again."))
        if not self._is_stopping:
            self._recovery = asyncio.ensure_future(self.recover(self.start))

    def _send(self, *message) -> None:
        # Plain pickle copies tensors. The connection's own would share their memory, with a file descriptor for each.
        try:
            self._sender.submit(self._connection.send_bytes, pickle.dumps(message))
        except RuntimeError:  # shut down: the process has ended, and those who wait are told
            pass

    async def generate(self, request: EngineRequest) -> AsyncIterator[list]:
        if not self.is_ready:
            raise EngineDied("The engine is not ready.")
        name, queue, is_over = str(next(self._names)), asyncio.Queue(), False
        self._queues[name] = queue
        self._send("add", name, request)
        try:
            while not is_over:
                report = await queue.get()
                if isinstance(report, list):
                    yield report
                    continue
                is_over = True
                if report is not None:
                    raise report
        finally:
            del self._queues[name]
            if not is_over:
                self._send("cancel", name)


def run_batch(connection: Connection, load: partial[Batch]) -> None:
    """Load a batch and step until the pipe closes: what the engine's process does.

    Received: `("add", name, request)` and `("cancel", name)`. Sent: first `None`, or a sentence on why the model can't
    be loaded; then after each step `(progress, statistics)`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends this process when all images are done
        signal.signal(number, signal.SIG_IGN)
    try:
        batch = load()
    except (OSError, ValueError) as error:
        connection.send(str(error))
        return
    connection.send(None)
    try:
        while True:
            while batch.is_idle or connection.poll():
                kind, *arguments = connection.recv()
                (batch.add if kind == "add" else batch.cancel)(*arguments)
                if kind == "cancel" and batch.is_idle:
                    connection.send((Progress(), batch.statistics))
            connection.send((batch.step(), batch.statistics))
    except (EOFError, OSError):
        pass  # the server has ended


def spawn(load: partial[Batch]) -> tuple[BaseProcess, Connection]:
    """Start the engine's process, which inherits none of this one's threads and devices."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        # A small process that has imported what engines need and done nothing else. The first start takes as long as
        # with "spawn", and an engine that died is back at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, load.func.__module__])
    else:
        context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_batch, args=(theirs, load), name="llamagen-engine", daemon=True)
    process.start()
    theirs.close()  # so that ours reports the end of the process
    return process, ours
