"""The engine in its own process: the same codes, cancellation, death and restart."""

import asyncio
import os
import signal
from contextlib import aclosing
from functools import partial

import pytest
from tiny import build_transformer
from tiny_requests import draw_alone, random_requests

from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.serving.batch import ContinuousBatch, GenerationRequest
from llamagen_hf.serving.engine import EngineDied, EngineRequest
from llamagen_hf.serving.local_engine import LocalEngine, Progress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generator")
    build_transformer(conditioning="text").save_pretrained(path)
    return str(path)


class Squares:
    """A batch of another family: the latents of an image are the squares of its first numbers, one each step."""

    def __init__(self, length: int):
        self.length, self.images = length, {}

    @property
    def is_idle(self) -> bool:
        return not self.images

    @property
    def statistics(self) -> dict[str, float]:
        return {"images": len(self.images)}

    def add(self, name: str, request: EngineRequest) -> None:
        self.images[name] = request.seed

    def cancel(self, name: str) -> None:
        self.images.pop(name, None)

    def step(self) -> Progress:
        progress = Progress({name: [number**2] for name, number in self.images.items()})
        self.images = {name: number + 1 for name, number in self.images.items()}
        progress.finished = {name for name, number in self.images.items() if number == self.length}
        for name in progress.finished:
            self.cancel(name)
        return progress


async def generated_by(engine: LocalEngine, request: GenerationRequest) -> list[int]:
    return [code async for codes in engine.generate(request) for code in codes]


async def until(condition) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it does not happen")


def test_generates_cancels_dies_and_restarts(folder):
    """One process for all of it, since starting one takes seconds."""
    requests = random_requests("text", 30)
    decoder = CodeDecoder(build_transformer(conditioning="text"))
    expected = [draw_alone(decoder, request) for request in requests]

    async def scenario():
        engine = LocalEngine(partial(ContinuousBatch.from_pretrained, folder, slots=16, threads=1), capacity=8)
        with pytest.raises(EngineDied, match="not ready"):
            await generated_by(engine, requests[0])
        await engine.start()
        assert engine.is_ready and engine.capacity == 8
        try:
            assert await asyncio.gather(*(generated_by(engine, request) for request in requests)) == expected

            async with aclosing(engine.generate(requests[0])) as codes:
                async for _ in codes:
                    break
            waiting = asyncio.ensure_future(generated_by(engine, requests[1]))
            await asyncio.sleep(0)
            waiting.cancel()
            assert await generated_by(engine, requests[2]) == expected[2]
            assert engine._queues == {}
            await until(lambda: engine.statistics["drawing"] == engine.statistics["waiting"] == 0)

            others = [asyncio.ensure_future(generated_by(engine, request)) for request in requests]
            await asyncio.sleep(0)
            os.kill(engine.process.pid, signal.SIGKILL)
            results = await asyncio.gather(*others, return_exceptions=True)
            assert any(isinstance(result, EngineDied) for result in results)
            for result, codes in zip(results, expected, strict=True):
                assert isinstance(result, EngineDied) or result == codes
            assert not engine.is_ready and not engine.has_given_up
            await until(lambda: engine.is_ready)
            assert await generated_by(engine, requests[3]) == expected[3]
            assert engine.statistics["deaths"] == 1

            engine.restarts = False
            os.kill(engine.process.pid, signal.SIGKILL)
            await until(lambda: engine.has_given_up)
            assert not engine.is_ready
        finally:
            await engine.stop()
        assert not engine.process.is_alive()

    asyncio.run(scenario())


def test_batches_of_any_family_are_run():
    async def scenario():
        engine = LocalEngine(partial(Squares, 5), capacity=2)
        await engine.start()
        try:
            requests = [EngineRequest(seed=first) for first in (0, 3)]
            results = await asyncio.gather(*(generated_by(engine, request) for request in requests))
            assert results == [[0, 1, 4, 9, 16], [9, 16]]
        finally:
            await engine.stop()

    asyncio.run(scenario())


def test_start_says_why_it_fails(tmp_path):
    async def scenario():
        await LocalEngine(partial(ContinuousBatch.from_pretrained, str(tmp_path / "nothing")), capacity=1).start()

    with pytest.raises(ValueError, match="nothing"):
        asyncio.run(scenario())
