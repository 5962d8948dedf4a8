"""The server under load beside the plain loop, in one run: images/s, and how long a client waits.

python benchmarks/serve.py [--checkpoint FOLDER_OR_ID] [--clients 1 8 32 128] [--images 4] [--seconds 60]
python benchmarks/serve.py --soak 600 [--clients 8]

- loop:   `pipe.stream(...)`, one request at a time, in the order in which they come
- server: `llamagen serve`, started here on loopback, streamed over HTTP

Each client sends its next request, with a new seed, as soon as it has its image, until it has `--images` of them or
`--seconds` are over; an image that is unfinished then counts as having taken longer. Three previews of each image are
requested. The server leaves out the second and third when its decoder is busy, so the table counts them. The soak test
looks at the server's memory only: it generates for so many seconds and reports the resident memory of all processes.
"""

import argparse
import asyncio
import itertools
import json
import math
import re
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager

import httpx
import psutil
import torch

from llamagen_hf import AutoregressiveImagePipeline


PREVIEWS = 3


class Load:
    """What the clients of one level measured.

    Args:
        clients (`int`): Number of clients.
        images (`int`): Images of each client.
        seconds (`float`): Time limit.
    """

    def __init__(self, clients: int, images: int, seconds: float):
        self.clients, self.images, self.seconds = clients, images, seconds
        self.first: list[float] = []
        self.full: list[float] = []
        self.previews = 0
        self.begin = time.perf_counter()

    @property
    def is_over(self) -> bool:
        return time.perf_counter() - self.begin > self.seconds

    def row(self, mode: str) -> str:
        """A row of the table. Call it when all clients are done."""
        seconds = time.perf_counter() - self.begin
        finished = [value for value in self.full if math.isfinite(value)]
        each = self.previews / max(1, len(finished))
        cells = [self.clients, mode, len(finished), f"{len(finished) / seconds:.2f}", f"{each:.1f}"]
        for value in (*percentiles(self.first), *percentiles(self.full)):
            cells.append(f"{value:.2f}" if math.isfinite(value) else f"> {self.seconds:g}")
        return f"| {' | '.join(map(str, cells))} |"


def percentiles(values: list[float]) -> list[float]:
    """p50, p95 and p99."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95, 0.99)]


def load_loop(pipe: AutoregressiveImagePipeline, condition: dict, load: Load) -> None:
    """Clients that are served one after the other."""
    every = pipe.transformer.config.num_codes // (PREVIEWS + 1)
    line = deque([(load.begin, 1)] * load.clients)  # when each of them asked, and which of its images it asked for
    for seed in itertools.count():
        if not line:
            return
        start, number = line.popleft()
        first = full = math.inf
        if not load.is_over:
            generator = torch.Generator().manual_seed(seed)
            for step in pipe.stream(**condition, generator=generator, preview_every=every):
                load.previews += len(step.images) > 0 and step.output is None  # made when looked at
                first = min(first, time.perf_counter() - start)
            full = time.perf_counter() - start
        load.first.append(first)
        load.full.append(full)
        if number < load.images and not load.is_over:
            line.append((time.perf_counter(), number + 1))


def load_server(url: str, condition: dict, load: Load) -> None:
    """Clients on connections of their own."""

    # Seeds that no earlier run used, since the cache would answer those.
    seeds = itertools.count(time.time_ns() % 2**50)

    async def ask(session: httpx.AsyncClient, seed: int, start: float) -> tuple[float, float]:
        first = math.inf
        body = condition | {"seed": seed, "stream": True, "partial_images": PREVIEWS}
        async with session.stream("POST", "/v1/images/generations", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                assert line != "event: error", "the server failed"
                if line.startswith("event: "):
                    first = min(first, time.perf_counter() - start)
                    load.previews += line.endswith("partial_image")
                    if line.endswith("completed"):
                        return first, time.perf_counter() - start
        raise AssertionError("the stream ended before its image")

    async def client(session: httpx.AsyncClient) -> None:
        for _ in range(load.images):
            start = time.perf_counter()
            left = max(0.0, load.seconds - (start - load.begin))
            try:
                first, full = await asyncio.wait_for(ask(session, next(seeds), start), left)
            except asyncio.TimeoutError:
                first = full = math.inf
            load.first.append(first)
            load.full.append(full)
            if load.is_over:
                return

    async def clients() -> None:
        limits = httpx.Limits(max_connections=load.clients)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as session:
            await asyncio.gather(*(client(session) for _ in range(load.clients)))

    asyncio.run(clients())


@contextmanager
def running_server(args: argparse.Namespace):
    """`llamagen serve`: its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llamagen_cli", "serve", args.checkpoint, "--port", str(port)]
    command += ["--device", args.device, "--dtype", args.dtype, "--slots", str(args.slots), "--max-pending", "1024"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx.get(url + "/ready").status_code == 200:
                    break
            except httpx.ConnectError:
                pass
            if process.poll() is not None:
                raise SystemExit("The server does not start.")
            time.sleep(0.2)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def resident(process: psutil.Process) -> float:
    """Resident memory in MiB of a server and all its child processes."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True))) / 2**20


def soak(url: str, process: psutil.Process, condition: dict, clients: int, seconds: float) -> None:
    """Generate images for a while and report the memory ten times."""
    print("| seconds | images | MiB |\n|---:|---:|---:|")
    start, drawn = time.perf_counter(), 0
    for part in range(1, 11):
        load = Load(clients, 10**9, start + part * seconds / 10 - time.perf_counter())
        load_server(url, condition, load)
        drawn += sum(map(math.isfinite, load.full))
        print(f"| {time.perf_counter() - start:.0f} | {drawn} | {resident(process):.0f} |", flush=True)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--checkpoint", default="emoji")
    arguments.add_argument("--prompt", default="a red apple", help="A class id for a class-conditional checkpoint.")
    arguments.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    arguments.add_argument("--images", type=int, default=4, help="Of each client.")
    arguments.add_argument("--seconds", type=float, default=60, help="Time limit of each level and mode.")
    arguments.add_argument("--slots", type=int, default=64)
    arguments.add_argument("--soak", type=float, help="Seconds; with the first of --clients.")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32")
    args = arguments.parse_args()

    pipe = AutoregressiveImagePipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    pipe.to(args.device).set_progress_bar_config(disable=True)
    condition = {"prompt": args.prompt} if pipe.condition_kind == "text" else {"class_labels": int(args.prompt)}
    asked = {re.sub("labels", "label", name): value for name, value in condition.items()}
    with running_server(args) as (url, process):
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "pixels": pipe.image_size}
        print(
            f"{args.device} {args.dtype}, {json.dumps(facts)}; {args.slots} slots; server {resident(process):.0f} MiB"
        )
        load_loop(pipe, condition, Load(1, 1, 600))  # to warm up
        load_server(url, asked, Load(2, 1, 600))
        if args.soak is not None:
            soak(url, process, asked, args.clients[0], args.soak)
            return
        print(
            "| clients | mode | images | images/s | previews | first preview p50 | p95 | p99 | image p50 | p95 | p99 |"
        )
        print("|---:|---|" + "---:|" * 9)
        for clients in args.clients:
            load = Load(clients, args.images, args.seconds)
            load_loop(pipe, condition, load)
            print(load.row("loop"), flush=True)
            load = Load(clients, args.images, args.seconds)
            load_server(url, asked, load)
            print(load.row("server"), flush=True)
        print(f"server {resident(process):.0f} MiB")


if __name__ == "__main__":
    main()
