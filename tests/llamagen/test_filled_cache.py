"""The cache of steps that are not compiled: it hides what is not filled, and changes no bit of the logits."""

import pytest
import torch
from tiny import build_transformer
from transformers import StaticCache

from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.filled_cache import BLOCK, FilledCache


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_logits_are_those_of_the_whole_cache(conditioning, dtype):
    model, length = build_transformer(conditioning=conditioning, grid_size=10).to(dtype), 112
    config, mask = model.config, None
    if conditioning == "class":
        condition = {"input_ids": config.vocab_size + torch.arange(3)[:, None]}
    else:
        condition = {"prompt_embeds": torch.randn(3, config.condition_length, config.condition_dim, dtype=dtype)}
        mask = torch.ones(3, length, dtype=torch.long)
        mask[1, :4] = 0
    codes = torch.randint(config.vocab_size, (3, 90))
    filled, whole = (kind(config=config, max_cache_len=length) for kind in (FilledCache, StaticCache))
    shown = set()
    for _ in range(2):  # the second time after a reset, over what the first left behind
        for step in [condition, *({"input_ids": code} for code in codes.split(1, dim=1))]:
            settings = {"attention_mask": mask, "use_cache": True}
            got, expected = (model(**step, past_key_values=c, **settings).logits for c in (filled, whole))
            assert torch.equal(got, expected)
            shown.add(filled.layers[0].get_mask_sizes(0)[0])
        assert shown == {BLOCK, 2 * BLOCK, 3 * BLOCK, length} - ({length} if conditioning == "class" else set())
        filled.reset()
        whole.reset()
        codes = codes.flip(1)


def test_steps_that_are_compiled_have_a_cache_of_static_shapes():
    decoder, condition = CodeDecoder(build_transformer()), {"class_ids": torch.tensor([64])}
    decoder(torch.arange(1), **condition)
    assert {type(cache) for cache in decoder._spare_caches.values()} == {FilledCache}
    decoder.compile(backend="eager")
    decoder(torch.arange(1), **condition)
    assert {type(cache) for cache in decoder._spare_caches.values()} == {StaticCache}
