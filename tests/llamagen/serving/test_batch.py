"""Continuous batching: an image is what the pipeline generates alone, whatever joins and leaves beside it."""

import random
from dataclasses import replace

import pytest
import torch
from tiny import build_transformer
from tiny_requests import draw_alone, random_requests

from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.sampling import filter_top_k, filter_top_p, sample
from llamagen_hf.llamagen.serving.batch import ContinuousBatch, GenerationRequest
from llamagen_hf.serving.waiting_queue import WaitingQueue


def run(batch: ContinuousBatch, requests: list[GenerationRequest], joining: list[int]) -> dict[str, list[int]]:
    """Generate all images; before step i, the next `joining[i]` are added."""
    drawn = {str(i): [] for i in range(len(requests))}
    names, most = iter(drawn), 0
    for count in joining + [len(requests)] * 1000:
        for _, name in list(zip(range(count), names, strict=False)):
            batch.add(name, requests[int(name)])
        progress = batch.step()
        assert not progress.failures
        most = max(most, len(batch.images))
        for name, codes in progress.latents.items():
            drawn[name] += codes
        if batch.is_idle and all(drawn.values()):
            assert most > 3  # else there was no batch
            return drawn
    raise AssertionError("it does not end")


@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_image_is_the_one_drawn_alone(conditioning, attention):
    model = build_transformer(conditioning=conditioning)
    model.set_attn_implementation(attention)
    requests = random_requests(conditioning, 40)
    joining = [3, 0, 1, 0, 0, 8, 1, 1, 0, 0, 0, 0, 12, 2]
    drawn = run(ContinuousBatch(model, slots=11, prefill_positions=60), requests, joining)
    decoder = CodeDecoder(model)
    for request, codes in zip(requests, drawn.values(), strict=True):
        assert codes == draw_alone(decoder, request)
    assert len({tuple(codes) for codes in drawn.values()}) > 30


@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_windows_of_codes_draw_the_same_while_few_images_are_drawn(conditioning, attention):
    model = build_transformer(conditioning=conditioning)
    model.set_attn_implementation(attention)
    requests, batch = random_requests(conditioning, 30), ContinuousBatch(model, slots=32, decoding_window=5)
    widths, step = [], batch._step
    batch._step = lambda codes: widths.append(codes.shape[1]) or step(codes)
    # Two or three images at once take windows of 5, and many together one code a step.
    drawn = run(batch, requests, [2, 0, 1, 0, 0, 12, 0, 0, 0, 3, *[0] * 11, 2, *[0] * 7])
    decoder = CodeDecoder(model)
    for request, codes in zip(requests, drawn.values(), strict=True):
        assert codes == draw_alone(decoder, request)
    assert set(widths) == {1, 5} and widths.count(5) > 5


def test_fewer_key_value_heads_than_queries():
    model = build_transformer(num_attention_heads=4, num_key_value_heads=2)
    requests = random_requests("class", 12)
    drawn = run(ContinuousBatch(model, slots=8), requests, [4])
    assert list(drawn.values()) == [draw_alone(CodeDecoder(model), request) for request in requests]


def test_cancelled_images_leave_and_do_not_disturb():
    model = build_transformer()
    requests = random_requests("class", 12)
    batch, drawn = ContinuousBatch(model, slots=8), {str(i): [] for i in range(12)}
    for name in drawn:
        batch.add(name, requests[int(name)])
    for step in range(200):
        if step == 2:
            running = list(batch.images)[:3]
            waiting = [name for name in drawn if name not in batch.images and not drawn[name]][-1]
            for name in (*running, waiting, "nobody"):
                batch.cancel(name)
        for name, codes in batch.step().latents.items():
            drawn[name] += codes
    assert batch.is_idle and not batch._streams
    assert not drawn[waiting]
    for name, codes in drawn.items():
        expected = draw_alone(CodeDecoder(model), requests[int(name)])
        assert codes == (expected[: len(codes)] if name in (*running, waiting) else expected)


def test_an_image_that_overflows_fails_alone():
    model = build_transformer()
    with torch.no_grad():
        model.model.embed_tokens.weight[64 + 9] = torch.inf
    requests = [GenerationRequest(seed=i, class_id=64 + (9 if i % 2 else i), guidance_scale=2.0) for i in range(8)]
    batch, failures, drawn = ContinuousBatch(model, slots=6), {}, {str(i): [] for i in range(8)}
    for name in drawn:
        batch.add(name, requests[int(name)])
    while not batch.is_idle:
        progress = batch.step()
        failures |= progress.failures
        for name, codes in progress.latents.items():
            drawn[name] += codes
    assert set(failures) == {"1", "3", "5", "7"} and "not finite" in failures["1"]
    for name in "0246":  # some of them in slots where the others were
        assert drawn[name] == draw_alone(CodeDecoder(model), requests[int(name)])


def test_guidance_takes_two_rows_only_as_long_as_it_lasts():
    batch = ContinuousBatch(build_transformer(), slots=8)
    batch.add("always", GenerationRequest(seed=0, class_id=64, guidance_scale=2.0))
    batch.add("first codes", GenerationRequest(seed=1, class_id=65, guidance_scale=2.0, guidance_interval=2))
    batch.add("never", GenerationRequest(seed=2, class_id=66))
    rows = []
    while not batch.is_idle:
        batch.step()
        rows.append({name: len(image.rows) for name, image in batch.images.items()})
    assert [step["always"] for step in rows[:-1]] == [2] * 14
    assert [step["first codes"] for step in rows[:-1]] == [2] * 2 + [1] * 12  # codes 0 to 3, two in the first step
    assert [step["never"] for step in rows[:-1]] == [1] * 14


def test_new_images_are_read_a_few_at_a_time():
    """Active images get a code at every step, however many join."""
    batch = ContinuousBatch(build_transformer(conditioning="text"), slots=64, prefill_positions=48)
    first, *others = random_requests("text", 20)
    batch.add("first", first)
    batch.step()
    for name, request in enumerate(others):
        batch.add(str(name), replace(request, prefix_codes=[], guidance_scale=2.0))
    for step in range(1, 5):
        assert len(batch.step().latents["first"]) == 1
        assert len(batch.images) == 1 + 2 * step  # 24 positions each


def test_the_queue_is_fair_to_small_requests():
    queue = WaitingQueue(spacing=4)
    for place in range(6):
        queue.add(f"large {place}", GenerationRequest(seed=0, place=place))
    for number in range(3):
        queue.add(f"small {number}", GenerationRequest(seed=0))
    queue.discard("large 1")
    order = [queue.pop()[0] for _ in range(len(queue))]
    assert order == ["large 0", "small 0", "small 1", "small 2", "large 2", "large 3", "large 4", "large 5"]
    assert queue.first() is None
    # No image waits for ever: a bounded number of later ones overtake it.
    queue.add("large 0", GenerationRequest(seed=0))
    queue.add("large 1", GenerationRequest(seed=0, place=1))
    for number in range(20):
        queue.add(f"small {number}", GenerationRequest(seed=0))
    order = [queue.pop()[0] for _ in range(len(queue))]
    assert order.index("large 1") == 4


@pytest.mark.parametrize("vocabulary", [64, 5000])
def test_settings_for_each_row_change_no_bit(vocabulary):
    logits = torch.randn(200, vocabulary) * 3
    logits[:20] = logits[:20].round()  # ties
    keys, indices = torch.arange(200), torch.arange(200) % 16
    choose = random.Random(0)
    temperatures = [choose.choice([0, 0.1, 1.0, 0.7, 1e-9, 1.33]) for _ in range(200)]
    top_ks = [choose.choice([0, 0, 1, 7, 63, 10**6]) for _ in range(200)]
    top_ps = [choose.choice([1.0, 1.0, 0.0, 0.3, 0.95]) for _ in range(200)]
    together = sample(logits, keys, indices, torch.tensor(temperatures), torch.tensor(top_ks), torch.tensor(top_ps))
    kept = filter_top_k(logits, torch.tensor(top_ks)), filter_top_p(logits, torch.tensor(top_ps))
    for i, (temperature, top_k, top_p) in enumerate(zip(temperatures, top_ks, top_ps, strict=True)):
        row = slice(i, i + 1)
        assert together[i] == sample(logits[row], keys[row], i % 16, temperature, top_k, top_p)
        assert torch.equal(kept[0][row], filter_top_k(logits[row], top_k))
        assert torch.equal(kept[1][row], filter_top_p(logits[row], top_p))
    for plain in (torch.zeros(200).long(), torch.ones(200)):
        assert (filter_top_k if plain.dtype == torch.long else filter_top_p)(logits, plain) is logits


@pytest.mark.slow
def test_compiled_steps_draw_the_same():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = build_transformer(conditioning="text", num_hidden_layers=1)
    requests = random_requests("text", 12)
    batch, counter = ContinuousBatch(model, slots=8), CompileCounterWithBackend("inductor")
    batch.compile(backend=counter, mode="default")
    drawn = run(batch, requests, [1, 0, 3, 2])
    assert list(drawn.values()) == [draw_alone(CodeDecoder(model), request) for request in requests]
    assert counter.frame_count <= 4  # one, two, four and eight rows
