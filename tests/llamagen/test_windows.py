import pytest
import torch
from tiny import build_transformer
from tiny_conditions import CONDITIONS

from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.noise import draw_noise_keys
from llamagen_hf.llamagen.windows import CodeWindows


SETTINGS = {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 20}


def counted_steps(decoder):
    """Widths of the steps that the decoder takes from now on."""
    widths, steps = [], (decoder._step, decoder._window_step)
    decoder._step = lambda codes, *rest: widths.append(1) or steps[0](codes, *rest)
    decoder._window_step = lambda codes, *rest: widths.append(codes.shape[1]) or steps[1](codes, *rest)
    return widths


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("conditioning", ["class", "text"])
@pytest.mark.parametrize("change", [{}, {"guidance_scale": 1.0}, {"guidance_interval": 4}, {"top_p": 0.9}])
def test_windows_draw_the_codes_of_single_steps(conditioning, attention, change):
    model = build_transformer(conditioning=conditioning)
    model.set_attn_implementation(attention)
    decoder, settings = CodeDecoder(model), SETTINGS | change
    for batch in (1, 3):
        condition, keys = CONDITIONS[conditioning](batch), draw_noise_keys(batch, None, torch.device("cpu"))
        expected = decoder(keys, **condition, **settings)
        for width in (2, 5, 15, 64):
            assert torch.equal(decoder(keys, **condition, **settings, decoding_window=width), expected), width


def test_steps_are_fewer_where_guesses_are_right():
    model, condition = build_transformer(), CONDITIONS["class"](2)
    decoder, keys = CodeDecoder(model), torch.arange(2)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # codes depend on their noise alone, so any draw is final
    expected, widths = decoder(keys, **condition), counted_steps(decoder)
    assert torch.equal(decoder(keys, **condition, decoding_window=8), expected)
    # The first code comes with the condition. Of the others, one step draws a window, the next finds them right.
    assert set(widths) == {8} and len(widths) <= 5


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_codes_that_are_kept(conditioning):
    model, condition = build_transformer(conditioning=conditioning), CONDITIONS[conditioning](3)
    decoder, keys = CodeDecoder(model), torch.arange(3)
    whole = decoder(keys, **condition, **SETTINGS)
    for count in (1, 6, 14, 15):
        prefix = (whole[:, :count] + 1) % 64
        expected = decoder(keys, **condition, **SETTINGS, prefix_codes=prefix)
        windowed = decoder(keys, **condition, **SETTINGS, prefix_codes=prefix, decoding_window=6)
        assert torch.equal(windowed, expected)


def test_every_code_is_given_and_changes_count_from_there():
    model, condition = build_transformer(), CONDITIONS["class"](2)
    keys = torch.arange(2)

    def draw(**window):
        stream = CodeDecoder(model).stream(keys, **condition, **SETTINGS, **window)
        codes, lengths = next(stream), []
        for index in range(16):
            lengths.append(codes.shape[1])
            if index in (3, 9):
                codes[0, index] = 7
            if index < 15:
                codes = stream.send(1.5 if index == 5 else None)
        return codes.clone(), lengths

    expected, lengths = draw()
    windowed, windowed_lengths = draw(decoding_window=6)
    assert lengths == windowed_lengths == list(range(1, 17))
    assert torch.equal(windowed, expected)


def test_caches_serve_windows_and_single_codes_in_turn():
    decoder, condition = CodeDecoder(build_transformer()), CONDITIONS["class"](2)
    first = decoder(torch.arange(2), **condition, **SETTINGS)
    for width in (4, 1, 9, 4):
        assert torch.equal(decoder(torch.arange(2), **condition, **SETTINGS, decoding_window=width), first)
    with torch.inference_mode():
        assert torch.equal(decoder(torch.arange(2), **condition, **SETTINGS, decoding_window=4), first)


def test_attention_without_windows_is_refused():
    model = build_transformer()
    model.config._attn_implementation = "flash_attention_2"
    decoder = CodeDecoder(model)
    with pytest.raises(ValueError, match="a step draws one code: leave out `decoding_window`"):
        decoder(torch.arange(1), **CONDITIONS["class"](1), decoding_window=4)
    assert decoder.resolve_window("auto", 2, torch.device("cpu")) == 1


def test_logits_that_overflow_are_refused():
    model = build_transformer()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="The logits are not finite"):
        CodeDecoder(model)(torch.arange(2), **CONDITIONS["class"](2), decoding_window=4)


def test_the_fastest_window_is_measured_once():
    decoder = CodeDecoder(build_transformer())
    widths = counted_steps(decoder)
    window = decoder.resolve_window("auto", 2, torch.device("cpu"))
    assert window in widths and len(set(widths)) > 1
    widths.clear()
    assert decoder.resolve_window("auto", 2, torch.device("cpu")) == window and not widths
    assert decoder.resolve_window(3, 2, torch.device("cpu")) == 3


def test_images_of_a_batch_go_on_at_their_own_pace():
    windows = CodeWindows(torch.zeros(2, 16, dtype=torch.long), 1, 4, grid_size=4)
    windows.guess()
    drawn = torch.tensor([[0, 0, 0, 5], [9, 0, 0, 0]])
    windows.update(drawn)
    assert windows.num_final.tolist() == [5, 2]
    assert windows.codes[0, 1:5].tolist() == [0, 0, 0, 5] and windows.codes[1, 1] == 9
    assert windows.inputs.tolist() == [[4, 5, 6, 7], [1, 2, 3, 4]]
    read = windows.guess()
    assert read[0].tolist() == [5, 0, 0, 0]  # those after the fifth are new: the codes above them
    windows.roll_back(3)
    assert windows.num_final.tolist() == [3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_compiled_windows_draw_the_same(conditioning):
    model, condition = build_transformer(conditioning=conditioning, num_hidden_layers=1), CONDITIONS[conditioning](2)
    expected = CodeDecoder(model)(torch.arange(2), **condition, **SETTINGS)
    decoder = CodeDecoder(model)
    decoder.compile(mode="default")
    for _ in range(2):
        assert torch.equal(decoder(torch.arange(2), **condition, **SETTINGS, decoding_window=6), expected)
