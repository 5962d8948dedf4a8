"""A real server on loopback in a thread, around a tiny checkpoint."""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from diffusers import DiffusionPipeline
from openai import OpenAI
from tiny import build_text_pipeline, build_transformer

from llamagen_cli.serve import load_frontend
from llamagen_hf.families import load_pipeline
from llamagen_hf.serving.engine import Engine, EngineRequest
from llamagen_hf.serving.local_engine import Batch, LocalEngine
from llamagen_hf.serving.server import Server
from llamagen_hf.serving.service import ImageService
from llamagen_hf.serving.settings import ServingSettings


class InlineEngine(Engine):
    """A batch that steps in the server's own process, since one of its own takes seconds to start."""

    def __init__(self, load: Callable[[], Batch], capacity: int):
        super().__init__()
        self.load, self.capacity = load, capacity
        self.queues: dict[str, asyncio.Queue] = {}
        self.work: asyncio.Task | None = None

    async def start(self) -> None:
        self.batch, self.is_ready = self.load(), True

    async def stop(self) -> None:
        self.is_ready = False

    async def generate(self, request: EngineRequest) -> AsyncIterator[list]:
        name, queue = str(id(request)), asyncio.Queue()
        self.queues[name] = queue
        self.batch.add(name, request)
        if self.work is None or self.work.done():
            self.work = asyncio.ensure_future(self._step())
        while (latents := await queue.get()) is not None:
            yield latents

    async def _step(self) -> None:
        while not self.batch.is_idle:
            progress = self.batch.step()
            assert not progress.failures
            for name, report in [*progress.latents.items(), *((name, None) for name in progress.finished)]:
                self.queues[name].put_nowait(report)
            await asyncio.sleep(0)


class RunningServer:
    """A server, where it is, and ways to talk to it. Its engine is a process of its own unless it is `inline`."""

    def __init__(
        self,
        folder: Path,
        slots: int = 16,
        restarts: bool = True,
        upsampler: Path | None = None,
        inline: bool = False,
        **settings,
    ):
        large = None if upsampler is None else str(upsampler)
        frontend, generator, _ = load_frontend(str(folder), large, "cpu", torch.float32)
        load, capacity = generator.batch_loader(slots, threads=1), slots // 2
        self.engine = InlineEngine(load, capacity) if inline else LocalEngine(load, capacity, restarts)
        self.service = ImageService(frontend, self.engine, ServingSettings(model_name="tiny", **settings))
        self.server = Server(self.service, "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.folder = folder

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def client(self, **kwargs) -> OpenAI:
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | kwargs)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path)

    def metric(self, name: str) -> float:
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        raise KeyError(name)

    def until(self, condition, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it does not happen"
            time.sleep(0.02)

    def until_ready(self) -> None:
        self.until(lambda: self.get("/ready").status_code == 200)

    @property
    def pipe(self) -> DiffusionPipeline:
        """A pipeline that generates the same images without a server."""
        pipe = load_pipeline(self.folder)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@contextmanager
def running_server(folder: Path, **kwargs) -> Iterator[RunningServer]:
    running = RunningServer(folder, **kwargs)
    running.thread.start()
    try:
        running.until(lambda: running.server.started)
        running.until_ready()
        yield running
    finally:
        running.server.should_exit = True
        running.thread.join(20)
        assert not running.thread.is_alive()


def save_text_checkpoint(folder: Path, grid_size: int = 4) -> Path:
    """A larger grid is slower: a code takes a few milliseconds."""
    pipe = build_text_pipeline()
    pipe.register_modules(transformer=build_transformer(conditioning="text", grid_size=grid_size))
    pipe.save_pretrained(folder)
    return folder


class RunningCommand:
    """`llamagen serve` as a process, and what it writes."""

    def __init__(self, folder: Path, log: Path, *options: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "llamagen_cli", "serve", str(folder), "--port", str(port), *options]
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)

    @property
    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(self.url + "/ready").status_code == 200
        except httpx.ConnectError:
            return False


@contextmanager
def running_command(folder: Path, log: Path, *options: str, seconds: float = 300) -> Iterator[RunningCommand]:
    """`llamagen serve` of a folder, once it is ready. It is killed at the end if it still runs."""
    running = RunningCommand(folder, log, *options)
    end = time.monotonic() + seconds
    try:
        while not running.is_ready:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield running
    finally:
        running.process.kill()
        running.process.wait()
