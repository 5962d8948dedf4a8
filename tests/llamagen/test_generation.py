"""transformers' `generate` draws what the pipeline draws."""

import pytest
import torch
from tiny import build_class_pipeline, build_text_pipeline
from transformers import GenerationConfig


CACHES = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
caches = pytest.mark.parametrize("cache", CACHES, ids=["dynamic", "none", "static"])


def greedy(pipe, guidance_scale=1, **condition):
    codes = pipe(**condition, temperature=0, guidance_scale=guidance_scale, output_type="codes").images
    return codes.flatten(1)


@pytest.fixture(scope="module")
def text():
    """Transformer, prompts of different length, their mask, and the likeliest codes."""
    pipe = build_text_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = ["apple", "a red pear"]
    embeds, mask = pipe.encode_prompt(prompts)
    assert mask[0].sum() < mask[1].sum()
    condition = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    return pipe.transformer, condition, greedy(pipe, prompt=prompts)


@pytest.fixture(scope="module")
def classes():
    """Transformer, class ids followed by the likeliest codes, and the same with guidance."""
    pipe = build_class_pipeline()
    ids = torch.tensor([[65], [66]])
    drawn = [torch.cat([ids, greedy(pipe, scale, class_labels=[1, 2])], dim=1) for scale in (1, 3.0)]
    return pipe.transformer, *drawn


@caches
def test_prompts_alone_and_with_a_prefix(text, cache):
    model, condition, expected = text
    for n in (0, 1, 5, 15):
        prefix = {} if n == 0 else {"input_ids": expected[:, :n]}
        assert torch.equal(model.generate(**prefix, **condition, do_sample=False, **cache), expected)
    embeds = model.model.text_projector(condition["prompt_embeds"])
    mask = condition["prompt_attention_mask"]
    padded = model.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, **cache)
    assert torch.equal(padded, expected)


@caches
def test_classes_stop_at_the_end_of_the_grid(classes, cache):
    model, expected, _ = classes
    for n in (0, 1, 5, 15):
        assert torch.equal(model.generate(expected[:, : 1 + n], do_sample=False, **cache), expected)
    embeds = model.model.embed_tokens(expected[:, :3])
    assert torch.equal(model.generate(inputs_embeds=embeds, do_sample=False, **cache), expected[:, 3:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_guidance_has_the_null_class_and_the_prefix(classes, use_cache):
    model, _, expected = classes
    for n in (0, 4):
        for null in (
            {},
            {"negative_prompt_ids": torch.tensor([[74]])},
            {"negative_prompt_ids": torch.full((2, 1), 74)},
        ):
            settings = null | {"guidance_scale": 3.0, "do_sample": False, "use_cache": use_cache}
            assert torch.equal(model.generate(expected[:, : 1 + n], **settings), expected)
    several = model.generate(expected[:, :1], guidance_scale=3.0, do_sample=True, num_return_sequences=3)
    assert several.shape == (6, 17)


def test_lengths_beams_and_outputs(text, classes):
    model, condition, expected = text
    assert model.generate(**condition, do_sample=True, num_return_sequences=3).shape == (6, 16)
    beams = model.generate(expected[:, :2], **condition, do_sample=False, num_beams=3, num_return_sequences=2)
    assert beams.shape == (4, 16) and torch.equal(beams[:, :2], expected[:, :2].repeat_interleave(2, 0))
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    output = model.generate(expected[:, :2], **condition, **settings)
    assert torch.equal(output.sequences, expected[:, :5]) and len(output.scores) == 3
    assert model.generate(**condition, max_new_tokens=100).shape == (2, 16)

    model, expected, _ = classes
    prefix = expected[:, :3]
    for settings, length in [
        ({"max_new_tokens": 2}, 5),
        ({"max_new_tokens": 100}, 17),
        ({"max_length": 9}, 9),
        ({"max_length": 100}, 17),
        ({"generation_config": GenerationConfig(max_new_tokens=100)}, 17),
        ({"num_beams": 2, "do_sample": False}, 17),
    ]:
        assert model.generate(prefix, **settings).shape == (2, length), settings


def test_what_it_cannot_do_it_says(text, classes):
    model, condition, expected = text
    for kwargs, message in [
        ({}, "text-conditional: pass `prompt_embeds`"),
        ({"inputs": expected[:, :1]}, "text-conditional: pass `prompt_embeds`"),
        ({"prompt_embeds": condition["prompt_embeds"][:, 1:]}, r"shape \(2, 11, 16\); expected \(batch, 12, 16\)"),
        (condition | {"inputs": expected}, "All 16 codes are given: none is left to generate"),
        (condition | {"guidance_scale": 2.0}, "can't guide without a class"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(**kwargs)
    model, expected, _ = classes
    for kwargs, message in [
        ({}, "class-conditional: pass the class in `inputs`"),
        ({"inputs": expected}, "All 16 codes are given"),
        ({"inputs": expected[:, :1]} | condition, "class-conditional: pass the class in `input_ids`"),
        ({"inputs": expected[:, :1], "guidance_scale": 2.0, "num_beams": 2}, "can't guide a beam search"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(**kwargs)
