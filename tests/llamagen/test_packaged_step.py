"""The compiled step of CPUs draws the codes of the eager one, as a package or without."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import build_transformer

from llamagen_hf.llamagen.decoding import CodeDecoder


pytestmark = pytest.mark.slow

CONDITION = {"class_ids": torch.tensor([65, 66])}
SETTINGS = {"guidance_scale": 3.0, "guidance_interval": 5, "top_k": 20}


@pytest.mark.parametrize("packages", [True, False])
def test_it_draws_the_codes_of_the_eager_step(packages, monkeypatch, caplog):
    model = build_transformer(num_hidden_layers=1)
    decoder, keys = CodeDecoder(model), torch.arange(2)
    expected = decoder(keys, **CONDITION, **SETTINGS)
    decoder.compile()
    if not packages:

        def refuse(*args, **kwargs):
            raise RuntimeError("no compiler")

        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
        monkeypatch.setattr("llamagen_hf.loading.package._key", lambda *_: "absent")
    with caplog.at_level(logging.WARNING):
        for window in (1, 6):
            assert torch.equal(decoder(keys, **CONDITION, **SETTINGS, decoding_window=window), expected)
        kept = {"prefix_codes": expected[:, :7]}
        assert torch.equal(decoder(keys, **CONDITION, **SETTINGS, **kept), expected)
    warnings = [message for message in caplog.messages if "no compiler" in message]
    assert len(warnings) == (0 if packages else 2)  # one for each shape


def test_guidance_may_change_on_the_way():
    model = build_transformer(num_hidden_layers=1)
    decoder, keys = CodeDecoder(model), torch.arange(2)

    def draw():
        stream = decoder.stream(keys, **CONDITION, **SETTINGS)
        codes = next(stream)
        while codes.shape[1] < model.config.num_codes:
            codes = stream.send(1.0 if codes.shape[1] == 3 else None)
        return codes.clone()

    expected = draw()
    decoder.compile()
    assert torch.equal(draw(), expected)


def test_concurrent_calls_do_not_mix():
    model = build_transformer(num_hidden_layers=1)
    decoder = CodeDecoder(model)
    decoder.compile()
    keys = [torch.arange(2) + 2 * i for i in range(8)]
    expected = [decoder(each, **CONDITION, **SETTINGS) for each in keys]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: decoder(each, **CONDITION, **SETTINGS), keys))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
