"""What is around a call, torch's defaults and modes, does not change what a seed draws."""

from contextlib import contextmanager

import pytest
import torch
from tiny import build_class_pipeline, build_text_pipeline, generators


IMAGE = {"image": torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3)), "keep_rows": 2}
CONDITIONS = {
    "class and image": (build_class_pipeline, {"class_labels": [1, 2]} | IMAGE),
    "text": (build_text_pipeline, {"prompt": ["apple", "a pear"]}),
}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast_float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
}


def everything(pipe, condition):
    settings = condition | {"output_type": "pt"}
    output = pipe(**settings, generator=generators(0, 1))
    steps = list(pipe.stream(**settings, generator=generators(0, 1), preview_every=5))
    scored = pipe(
        **settings,
        generator=torch.Generator().manual_seed(5),
        num_candidates=2,
        scorer=lambda images, names: range(len(images)),
    )
    ranked = pipe(**settings, generator=torch.Generator().manual_seed(5), num_candidates=3)
    scores = torch.tensor([[each.score for each in image] for image in ranked.candidates], dtype=torch.float64)
    return [output.codes, output.images, *(step.images for step in steps), scored.images, ranked.images, scores]


@pytest.fixture(scope="module", params=CONDITIONS)
def drawn(request):
    build, condition = CONDITIONS[request.param]
    return build, condition, everything(build(), condition)


@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_changes_nothing(drawn, around):
    build, condition, expected = drawn
    pipe = build()
    for _ in range(2):  # the second time on the caches of the first
        with AROUND[around]():
            got = everything(pipe, condition)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
        assert not any(tensor.requires_grad for tensor in got)
    with AROUND[around]():
        again = pipe.redraw(pipe(**condition | {"generator": generators(0, 1)}).parameters[1], output_type="pt")
    torch.testing.assert_close(again.codes, expected[0][1:])


def test_weights_in_another_dtype_than_autocast():
    pipe = build_text_pipeline().to(torch.bfloat16)
    expected = pipe("apple", generator=generators(0)).codes
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(pipe("apple", generator=generators(0)).codes, expected)


def test_the_default_device_is_not_the_models():
    pipe, condition = build_class_pipeline(), {"class_labels": [1, 2]}
    expected = pipe(**condition, generator=generators(0, 1), output_type="pt")
    torch.set_default_device("meta")  # where nothing can be read, so that every tensor must say where it is
    try:
        got = pipe(**condition, generator=generators(0, 1), output_type="pt")
        fresh = pipe(**condition, output_type="pt")
        again = pipe.redraw(fresh.parameters[1], output_type="pt")
    finally:
        torch.set_default_device(None)
    assert torch.equal(got.images, expected.images) and torch.equal(again.images, fresh.images[1:])


def test_torchs_own_state_is_used_only_where_no_generator_is_given():
    pipe = build_class_pipeline()
    before = torch.get_rng_state()
    pipe(class_labels=[1, 2], generator=generators(0, 1))
    list(pipe.stream(class_labels=[1, 2], generator=generators(0, 1)))
    assert torch.equal(torch.get_rng_state(), before)
    first = pipe(class_labels=1).codes
    assert not torch.equal(pipe(class_labels=1).codes, first)
    torch.set_rng_state(before)
    assert torch.equal(pipe(class_labels=1).codes, first)
