"""A pipeline of which a part was left out: what works without it, and what says that it is missing."""

import json

import pytest
import torch
from PIL import Image
from tiny import build_class_pipeline, build_text_pipeline, generators

from llamagen_hf import AutoregressiveImagePipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    build_text_pipeline().save_pretrained(folder)
    return folder


def load(folder, **kwargs):
    pipe = AutoregressiveImagePipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_prompts_are_encoded_alone_and_drawn_elsewhere(folder):
    whole = load(folder)
    expected = whole("apple", generator=generators(0), output_type="pt")
    encoding = load(folder, transformer=None, vq_model=None)
    assert encoding.condition_kind == "text"
    embeds, mask = encoding.encode_prompt("apple")
    assert torch.equal(embeds, whole.encode_prompt("apple")[0])
    drawing = load(folder, text_encoder=None, tokenizer=None, vq_model=None)
    condition = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    codes = drawing(**condition, generator=generators(0), output_type="codes").images
    assert torch.equal(codes, expected.codes)
    assert [step.images.shape[1] for step in drawing.stream(**condition, output_type="codes")][-1] == 4
    decoding = load(folder, transformer=None, text_encoder=None, tokenizer=None)
    assert torch.equal(decoding.decode_codes(codes, "pt"), expected.images)
    assert decoding.image_size == 8
    picture = Image.new("RGB", (30, 20), "teal")
    assert torch.equal(decoding.encode_image(picture), whole.encode_image(picture))
    torch.testing.assert_close(
        decoding.preview(codes.flatten(1)[:, :5], "pt"), whole.preview(codes.flatten(1)[:, :5], "pt")
    )


MISSING = [
    ("vq_model", lambda pipe: pipe("apple"), "has no vq_model, without which it draws only output_type='codes'"),
    ("vq_model", lambda pipe: pipe("a", height=8, output_type="codes"), "has no vq_model"),
    (
        "vq_model",
        lambda pipe: pipe("a", image=torch.rand(1, 3, 8, 8), keep_rows=1, output_type="codes"),
        "no vq_model",
    ),
    ("vq_model", lambda pipe: next(pipe.stream("apple")), "has no vq_model"),
    ("vq_model", lambda pipe: pipe.encode_image(torch.rand(1, 3, 8, 8)), "has no vq_model, which turns images into"),
    ("vq_model", lambda pipe: pipe.decode_codes(torch.zeros(1, 4, 4, dtype=torch.long)), "has no vq_model, which"),
    ("vq_model", lambda pipe: pipe.preview(torch.zeros(1, 4, dtype=torch.long)), "has no vq_model"),
    ("vq_model", lambda pipe: pipe.image_size, "has no vq_model"),
    ("transformer", lambda pipe: pipe("apple"), "has no transformer, which draws: load it as well"),
    ("transformer", lambda pipe: next(pipe.stream("apple")), "has no transformer"),
    ("transformer", lambda pipe: pipe.redraw({"prompt": "apple"}), "has no transformer"),
    ("transformer", lambda pipe: pipe.compile_step(), "has no transformer"),
    ("transformer", lambda pipe: pipe.load_lora_weights("style"), "has no transformer"),
    ("transformer", lambda pipe: pipe.fuse_lora(), "There is no adapter"),
    ("text_encoder", lambda pipe: pipe("apple"), "no text encoder and tokenizer: load them with it, or pass"),
    ("text_encoder", lambda pipe: pipe.encode_prompt("apple"), "has no text_encoder, which encodes prompts"),
    ("tokenizer", lambda pipe: pipe("apple"), "no text encoder and tokenizer"),
    ("tokenizer", lambda pipe: pipe.encode_prompt("apple"), "has no tokenizer, which reads prompts"),
]


@pytest.mark.parametrize("name, use, message", MISSING)
def test_what_is_missing_is_said(folder, name, use, message):
    with pytest.raises(ValueError, match=message):
        use(load(folder, **{name: None}))


@pytest.mark.parametrize("name", ["vq_model", "transformer", "text_encoder", "tokenizer"])
def test_a_pipeline_with_a_part_missing_is_saved_loaded_and_shared(folder, name, tmp_path):
    pipe = load(folder, **{name: None})
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())[name] == [None, None]
    again = load(tmp_path)
    assert {part for part, component in again.components.items() if component is None} == {name}
    other = AutoregressiveImagePipeline.from_pipe(load(folder), **{name: None})
    assert getattr(other, name) is None and name in repr(other)
    whole = AutoregressiveImagePipeline(**again.components | {name: getattr(load(folder), name)})
    assert torch.equal(
        whole("apple", generator=generators(0)).codes, load(folder)("apple", generator=generators(0)).codes
    )


def test_without_a_checkpoint_nothing_says_how_long_prompts_are():
    whole = build_text_pipeline()
    pipe = AutoregressiveImagePipeline(None, None, whole.text_encoder, whole.tokenizer)
    with pytest.raises(ValueError, match="has no transformer, whose configuration is needed here"):
        pipe.encode_prompt("apple")
    assert AutoregressiveImagePipeline(whole.vq_model).image_size == 8
    assert AutoregressiveImagePipeline(transformer=build_class_pipeline().transformer).get_class_ids("goldfish") == 65
