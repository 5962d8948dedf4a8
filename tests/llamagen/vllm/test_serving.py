"""The server's engine on vLLM: the same images, and a new start after a death."""

import asyncio

import psutil
import pytest
from tiny import build_class_pipeline, build_text_pipeline, generators


pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

from llamagen_hf.llamagen.serving import vllm_engine  # noqa: E402
from llamagen_hf.llamagen.serving.batch import GenerationRequest  # noqa: E402
from llamagen_hf.llamagen.serving.vllm_engine import VLLMBackend  # noqa: E402
from llamagen_hf.serving.engine import EngineDied  # noqa: E402


def engine_processes():
    return [process for process in psutil.Process().children(recursive=True) if "VLLM" in process.name()]


async def draw(engine, request):
    return [code async for new in engine.generate(request) for code in new]


async def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        await asyncio.sleep(0.1)
    pytest.fail("waited in vain")


@pytest.fixture(autouse=True)
def own_processes(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(vllm_engine, "WATCH", 0.1)


def test_classes_and_a_new_start(tmp_path):
    pipe = build_class_pipeline()
    pipe.save_pretrained(tmp_path)
    expected = pipe(class_labels=4, guidance_scale=3.0, generator=generators(7), output_type="codes").codes.flatten()
    request = GenerationRequest(seed=7, class_id=64 + 4, guidance_scale=3.0)

    async def live():
        engine = VLLMBackend(str(tmp_path), max_num_seqs=4, enforce_eager=True)
        assert not engine.is_ready
        with pytest.raises(EngineDied, match="not ready"):
            await draw(engine, request)
        await engine.start()
        try:
            assert engine.capacity == 4
            assert await asyncio.gather(*(draw(engine, request) for _ in range(5))) == 5 * [expected.tolist()]
            under_way = asyncio.create_task(draw(engine, request))
            await asyncio.sleep(0)
            engine_processes()[0].kill()
            await asyncio.wait([under_way], timeout=60)  # it may have been done before
            await wait_for(lambda: engine.deaths == 1 and engine.is_ready)
            assert await draw(engine, request) == expected.tolist()
            engine.restarts = False
            engine_processes()[0].kill()
            await wait_for(lambda: engine.has_given_up)
            assert not engine.is_ready and engine.deaths == 2
        finally:
            await engine.stop()

    asyncio.run(live())


def test_prompts(tmp_path):
    pipe = build_text_pipeline()
    pipe.save_pretrained(tmp_path)
    embeds, mask = pipe.encode_prompt("a red apple")
    expected = pipe("a red apple", generator=generators(3), guidance_scale=2.0, top_k=9, output_type="codes").codes
    request = GenerationRequest(
        seed=3, prompt_embeds=embeds[0], prompt_attention_mask=mask[0], guidance_scale=2.0, top_k=9
    )

    async def live():
        engine = VLLMBackend(str(tmp_path), max_num_seqs=4, enforce_eager=True)
        await engine.start()
        try:
            assert await draw(engine, request) == expected.flatten().tolist()
        finally:
            await engine.stop()

    asyncio.run(live())
