import math

import pytest
import torch
from tiny import generators

from llamagen_hf.llamagen.noise import draw_noise_keys, gumbel_noise
from llamagen_hf.llamagen.sampling import (
    SamplingParams,
    draw,
    filter_top_k,
    filter_top_p,
    guide,
    is_guided,
    sample,
)


def kept(logits):
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_guidance_formula():
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    assert torch.equal(guide(conditional, unconditional, 3.0), torch.tensor([2.0, 0.0]))
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)


def test_guidance_interval_counts_as_released():
    assert all(is_guided(index, -1) for index in (0, 1, 255))
    assert [index for index in range(16) if is_guided(index, 5)] == list(range(7))
    assert [index for index in range(16) if is_guided(index, 0)] == [0, 1]


def test_top_k_keeps_ties_and_takes_any_size():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    assert kept(filter_top_k(logits, 1)) == [[1]]
    assert kept(filter_top_k(logits, 2)) == [[1, 2, 3]]
    assert kept(filter_top_k(logits, 100)) == [[0, 1, 2, 3]]
    assert filter_top_k(logits, 0) is logits


def test_top_p_keeps_the_code_that_crosses_and_at_least_one():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert kept(filter_top_p(logits, 0.0)) == [[0], [3]]
    assert kept(filter_top_p(logits, 0.4)) == [[0], [3]]
    assert kept(filter_top_p(logits, 0.6)) == [[0, 1], [2, 3]]
    assert kept(filter_top_p(logits, 0.9)) == [[0, 1, 2], [1, 2, 3]]
    assert filter_top_p(logits, 1.0) is logits


def test_filters_leave_their_input_alone():
    logits = torch.randn(2, 8)
    before = logits.clone()
    sample(logits, torch.arange(2), 0, temperature=0.5, top_k=3, top_p=0.5)
    assert torch.equal(logits, before)


def test_draw_follows_the_distribution():
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    count = 20_000
    for keys, indices in ((torch.arange(count), 5), (torch.full((count,), 7), torch.arange(count))):
        codes = draw(probabilities.log().expand(count, 4), gumbel_noise(keys, indices, 4))
        frequencies = codes.bincount(minlength=4) / count
        assert frequencies[1] == 0
        torch.testing.assert_close(frequencies, probabilities, atol=0.015, rtol=0)


def test_rare_codes_are_drawn_as_often_as_they_should():
    logits = torch.full((4096,), -9.0)
    logits[0] = math.log(1 - 4095 * math.exp(-9))  # the others have half of the probability between them
    noise = gumbel_noise(torch.arange(2000), 0, 4096)
    assert (draw(logits.expand(2000, -1), noise) != 0).float().mean() == pytest.approx(0.505, abs=0.035)


def test_temperature_zero_and_top_k_one_take_the_likeliest():
    logits = torch.randn(5, 100)
    assert torch.equal(sample(logits, torch.arange(5), 0, temperature=0), logits.argmax(-1))
    assert torch.equal(sample(logits, torch.arange(5), 0, top_k=1), logits.argmax(-1))
    assert torch.equal(sample(logits, torch.arange(5), 0, top_p=0.0), logits.argmax(-1))


def test_temperature_comes_before_the_filters():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    # At temperature 0.1 the first code has 99 % of the mass, so top-p 0.9 leaves it alone.
    codes = sample(logits.expand(200, 3), torch.arange(200), 0, temperature=0.1, top_p=0.9)
    assert codes.unique().tolist() == [0]


def test_keys_of_an_image_depend_on_its_generator_alone():
    alone = draw_noise_keys(1, generators(7), torch.device("cpu"))
    batch = draw_noise_keys(3, generators(1, 7, 2), torch.device("cpu"))
    assert batch[1] == alone[0]
    first_of_many = draw_noise_keys(3, torch.Generator().manual_seed(7), torch.device("cpu"))
    assert first_of_many[0] == alone[0]
    assert first_of_many[1] != first_of_many[0]


@pytest.mark.parametrize(
    "setting",
    [
        {"guidance_scale": -1.0},
        {"guidance_scale": float("nan")},
        {"guidance_scale": "4"},
        {"guidance_interval": -2},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_settings_out_of_range(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^`{name}` is .*; expected .*$"):
        SamplingParams(**setting).check_sampling()
