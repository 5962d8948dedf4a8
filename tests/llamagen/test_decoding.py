import pytest
import torch
from tiny import build_transformer, generators
from tiny_conditions import CONDITIONS, class_condition

from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.noise import draw_noise_keys
from llamagen_hf.llamagen.sampling import guide, is_guided


def uncached_greedy(model, condition, scale, interval):
    """The slow way: one full forward a code and stream, no cache, no doubled batch."""
    codes = torch.zeros(next(iter(condition.values())).shape[0], 0, dtype=torch.long)
    for index in range(model.config.num_codes):
        if "class_ids" in condition:
            ids = condition["class_ids"][:, None]
            null_ids = torch.full_like(ids, model.config.null_class_id)
            conditional = model(torch.cat([ids, codes], dim=1)).logits[:, -1]
            unconditional = model(torch.cat([null_ids, codes], dim=1)).logits[:, -1]
        else:
            null = model.model.uncond_embedding(len(codes))
            conditional = model(codes, **condition).logits[:, -1]
            unconditional = model(codes, **condition | {"prompt_embeds": null}).logits[:, -1]
        logits = guide(conditional, unconditional, scale) if is_guided(index, interval) else conditional
        codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], dim=1)
    return codes


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize("scale, interval", [(1.0, -1), (3.0, -1), (3.0, 4), (0.0, -1)])
def test_loop_equals_uncached_forwards(conditioning, scale, interval):
    model, condition = build_transformer(conditioning=conditioning), CONDITIONS[conditioning](3)
    codes = CodeDecoder(model)(
        torch.arange(3), **condition, guidance_scale=scale, guidance_interval=interval, temperature=0
    )
    assert torch.equal(codes, uncached_greedy(model, condition, scale, interval))
    assert len(codes.unique()) > 3  # a model that always says the same would prove nothing


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_same_seed_gives_the_same_codes_alone_in_a_batch_and_at_another_place(conditioning):
    model, condition = build_transformer(conditioning=conditioning), CONDITIONS[conditioning](4)
    decoder = CodeDecoder(model)
    settings = {"guidance_scale": 2.0, "top_k": 40, "top_p": 0.95}

    def draw(rows, seeds):
        keys = draw_noise_keys(len(rows), generators(*seeds), torch.device("cpu"))
        return decoder(keys, **{name: value[rows] for name, value in condition.items()}, **settings)

    batch = draw([0, 1, 2, 3, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(draw([2], [2]), batch[2:3])
    moved = draw([3, 2, 0], [3, 2, 0])
    assert torch.equal(moved, batch[[3, 2, 0]])
    assert not torch.equal(batch[0], batch[7])  # same condition, another seed


def test_guidance_of_one_runs_no_unconditional_half(monkeypatch):
    model, rows = build_transformer(), []
    monkeypatch.setattr(model.model.norm, "forward", lambda x, f=model.model.norm.forward: rows.append(len(x)) or f(x))
    CodeDecoder(model)(torch.arange(3), **class_condition(3), guidance_scale=1.0)
    assert set(rows) == {3}
    rows.clear()
    CodeDecoder(model)(torch.arange(3), **class_condition(3), guidance_scale=1.5)
    assert set(rows) == {6} and len(rows) == 16


def test_cache_is_allocated_once_per_batch_size():
    decoder = CodeDecoder(build_transformer())

    def spare():
        (cache,) = decoder._spare_caches.values()
        return cache, cache.layers[0].keys.data_ptr()

    decoder(torch.arange(2), **class_condition(2))
    first = spare()
    codes = decoder(torch.arange(2), **class_condition(2), temperature=0)
    assert spare() == first
    assert torch.equal(codes, CodeDecoder(decoder.model)(torch.arange(2), **class_condition(2), temperature=0))
    decoder(torch.arange(3), **class_condition(3))
    assert spare() != first


def test_drawings_that_go_on_side_by_side_do_not_mix():
    decoder, settings = CodeDecoder(build_transformer()), {"guidance_scale": 2.0}
    keys = [torch.arange(4, 4 + rows) for rows in (1, 1, 2)]
    alone = [decoder(numbers, **class_condition(len(numbers)), **settings) for numbers in keys]
    streams = [decoder.stream(numbers, **class_condition(len(numbers)), **settings) for numbers in keys]
    *_, together = zip(*streams, strict=True)
    for codes, expected in zip(together, alone, strict=True):
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_codes_that_are_kept_change_nothing_after_them(conditioning, scale):
    model, condition = build_transformer(conditioning=conditioning), CONDITIONS[conditioning](3)
    decoder, keys, settings = CodeDecoder(model), torch.arange(3), {"guidance_scale": scale, "top_k": 30}
    whole = decoder(keys, **condition, **settings)
    for count in (0, 1, 6, 15):
        kept = decoder(keys, **condition, **settings, prefix_codes=whole[:, :count])
        assert torch.equal(kept, whole)
    others = (whole[:, :6] + 1) % 64
    changed = decoder(keys, **condition, **settings, prefix_codes=others)
    assert torch.equal(changed[:, :6], others) and not torch.equal(changed[:, 6:], whole[:, 6:])


def test_inference_mode_and_back():
    decoder = CodeDecoder(build_transformer())
    with torch.inference_mode():
        inside = decoder(torch.arange(2), **class_condition(2), temperature=0)
    outside = decoder(torch.arange(2), **class_condition(2), temperature=0)
    assert torch.equal(inside, outside)


def test_stream_gives_every_code_and_the_last_may_be_changed():
    decoder = CodeDecoder(build_transformer())
    plain = decoder(torch.arange(2), **class_condition(2), temperature=0)
    lengths = []
    for codes in decoder.stream(torch.arange(2), **class_condition(2), temperature=0):
        lengths.append(codes.shape[1])
        if len(lengths) == 4:
            codes[:, 3] = 7
    assert lengths == list(range(1, 17))
    assert torch.equal(codes[:, :3], plain[:, :3]) and (codes[:, 3] == 7).all()
    assert not torch.equal(codes[:, 4:], plain[:, 4:])


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_compiled_step_is_one_graph_and_draws_the_same(conditioning):
    from torch._dynamo.testing import CompileCounterWithBackend

    model, condition = build_transformer(conditioning=conditioning, num_hidden_layers=1), CONDITIONS[conditioning](2)
    settings = {"guidance_scale": 3.0, "temperature": 0}
    expected = CodeDecoder(model)(torch.arange(2), **condition, **settings)
    counter = CompileCounterWithBackend("inductor")
    decoder = CodeDecoder(model)
    decoder.compile(backend=counter, mode="default")
    for _ in range(3):
        assert torch.equal(decoder(torch.arange(2), **condition, **settings), expected)
    assert counter.frame_count == 1
