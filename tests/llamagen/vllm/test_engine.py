"""The engine for servers, in processes of its own."""

import asyncio

import psutil
import pytest
import torch
from tiny import build_class_pipeline, generators


pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

from llamagen_hf import AutoregressiveImagePipeline  # noqa: E402
from llamagen_hf.llamagen.vllm import EngineDiedError, VLLMEngine  # noqa: E402


def engine_processes():
    return [process for process in psutil.Process().children(recursive=True) if "VLLM" in process.name()]


async def draw(engine, **request):
    return [code async for new in engine.draw(**request) for code in new]


async def requests_are_drawn_one_by_one(engine, pipe):
    requests = [{"class_label": index % 10, "seed": index, "guidance_scale": index / 4} for index in range(20)]
    images = await asyncio.gather(*(draw(engine, **request) for request in requests))
    for image, request in zip(images, requests, strict=True):
        request["class_labels"], seed = request.pop("class_label"), request.pop("seed")
        (codes,) = pipe(**request, generator=generators(seed), output_type="codes").codes
        assert image == codes.flatten().tolist()
    first, second = await draw(engine, class_label="goldfish"), await draw(engine, class_label=1)
    assert first != second  # seeds of their own
    rest = await draw(engine, class_label=1, seed=3, prefix_codes=images[0][:5])
    assert len(rest) == 11


async def bad_requests_hurt_no_one(engine):
    async def neighbour():
        return await draw(engine, class_label=2, seed=5)

    alone = await neighbour()
    with_neighbours = asyncio.gather(*(neighbour() for _ in range(4)))
    for request, message in [
        ({"class_label": 99}, "Class id 99 is out of range"),
        ({"class_label": 1, "top_p": 3}, "`top_p` is 3"),
        ({"class_label": 1, "seed": -1}, "`seed` is -1"),
        ({"class_label": 1, "prefix_codes": [64]}, "`prefix_codes` holds 64..64"),
        ({"class_label": 1, "prefix_codes": [0.5]}, "`prefix_codes` must be an integer tensor"),
        ({"class_label": 1, "prefix_codes": [0] * 16}, "`prefix_codes` has shape"),
        ({"prompt_embeds": torch.zeros(12, 16)}, "This checkpoint is class-conditional"),
        ({}, "Pass exactly one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            await draw(engine, **request)
    assert await with_neighbours == 4 * [alone]


async def a_drawing_that_is_left_stops(engine):
    stream = engine.draw(class_label=1)
    assert len(await anext(stream)) < 16  # more than one where the reader is late
    await stream.aclose()
    task = asyncio.create_task(draw(engine, class_label=1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(600):
        if engine._llm.get_num_unfinished_requests() == 0:
            break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("a drawing that was left goes on")


async def death_is_noticed(engine):
    """Also where nothing is asked."""
    assert engine.is_alive
    drawings = [asyncio.create_task(draw(engine, class_label=1)) for _ in range(8)]
    await asyncio.sleep(0)
    processes = engine_processes()
    processes[0].kill()
    for result in await asyncio.wait_for(asyncio.gather(*drawings, return_exceptions=True), 60):
        assert isinstance(result, EngineDiedError)
    assert not engine.is_alive
    with pytest.raises(EngineDiedError, match="The vLLM engine has died"):
        await draw(engine, class_label=1)
    assert psutil.wait_procs(processes, timeout=60)[1] == []  # the workers as well


@pytest.fixture
def run_engine(monkeypatch):
    """Run tasks with an engine, and see that nothing of it is left."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")

    async def run(folder, *tasks):
        engine = VLLMEngine(folder, enforce_eager=True, max_num_seqs=8)
        try:
            for task in tasks:
                await task(engine)
        finally:
            engine.shutdown()

    yield lambda *args: asyncio.run(run(*args))
    assert psutil.wait_procs(engine_processes(), timeout=60)[1] == []


def test_an_engine_in_its_life(tmp_path, run_engine):
    """One for all, since it takes a while to start."""
    pipe = build_class_pipeline()
    pipe.save_pretrained(tmp_path)

    async def requests_are_drawn_as_ours(engine):
        await requests_are_drawn_one_by_one(engine, pipe)

    run_engine(
        tmp_path, requests_are_drawn_as_ours, bad_requests_hurt_no_one, a_drawing_that_is_left_stops, death_is_noticed
    )


def test_the_emoji_checkpoint_draws_prompts(run_engine):
    pipe = AutoregressiveImagePipeline.from_pretrained()
    prompts = ["a red apple", "a smiling cat face with tears of joy, noto style"]
    settings = pipe.sampling_settings(top_k=300)  # the engine knows no defaults of a checkpoint
    embeds, mask = pipe.encode_prompt(prompts)

    async def draw_prompts(engine):
        images = [
            draw(engine, prompt_embeds=embeds[i], prompt_attention_mask=mask[i], seed=i, **settings) for i in range(2)
        ]
        expected = pipe(prompts, generator=generators(0, 1), output_type="codes", **settings)
        assert await asyncio.gather(*images) == expected.codes.flatten(1).tolist()
        for wrong, message in [(0 * mask[0], "leaves no word"), (mask[0].flip(0), "has padding after a word")]:
            with pytest.raises(ValueError, match=f"`prompt_attention_mask` {message}"):
                await draw(engine, prompt_embeds=embeds[0], prompt_attention_mask=wrong)

    run_engine(None, draw_prompts)
