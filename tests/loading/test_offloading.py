"""Weights that come and go draw what weights in place draw, to the last bit."""

import accelerate
import pytest
import torch
from tiny import build_class_pipeline, build_text_pipeline, build_vq_model, generators
from torch import nn
from transformers import BartConfig, BartModel, ByT5Tokenizer

from llamagen_hf import AutoregressiveImagePipeline


PIXELS = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
STARTS = {"nothing": {}, "image": {"image": PIXELS, "keep_rows": 2}, "codes": {"prefix_codes": torch.tensor([[1, 2]])}}
CONDITIONS = {build_class_pipeline: {"class_labels": [1, 2]}, build_text_pipeline: {"prompt": ["apple", "a pear"]}}


def offload(pipe, kind, folder):
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":  # by accelerate's call: diffusers' names the device "cpu:0", which accelerate can't do
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                accelerate.cpu_offload(component, torch.device("cpu"))
    else:
        level, _, disk = kind.partition(" to ")
        path = str(folder / "offloaded") if disk else None
        pipe.enable_group_offload("cpu", offload_type=level, num_blocks_per_group=1, offload_to_disk_path=path)


def everything(pipe, **condition):
    """What all ways of calling give."""
    settings = dict(condition)
    for output_type, start in zip(("pt", "codes", "np"), STARTS.values(), strict=True):
        settings |= {"output_type": output_type, "generator": generators(0, 1)}
        yield torch.as_tensor(pipe(**settings | start).images)
    settings["output_type"] = "pt"
    for start in STARTS.values():
        settings["generator"] = generators(0, 1)
        yield from (step.images for step in pipe.stream(**settings | start, preview_every=5))
    codes = pipe.encode_image(PIXELS)
    yield codes
    yield pipe.decode_codes(codes, "pt")
    yield pipe.preview(codes.flatten(1)[:, :7], "pt")
    settings["generator"] = generators(0, 1)
    yield pipe.variation(codes, 5, **settings).images
    yield pipe.vq_model(PIXELS).sample


@pytest.fixture(scope="module", params=CONDITIONS, ids=["class", "text"])
def expected(request):
    build = request.param
    return build, list(everything(build(), **CONDITIONS[build]))


@pytest.mark.parametrize(
    "kind",
    ["model", "sequential", "block_level", "leaf_level", "block_level to disk", "leaf_level to disk"],
)
def test_offloaded_weights_draw_the_same(expected, kind, tmp_path):
    build, wanted = expected
    pipe = build()
    offload(pipe, kind, tmp_path)
    got = list(everything(pipe, **CONDITIONS[build]))
    assert len(got) == len(wanted) and all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_folders_on_disk_are_not_taken_for_another_pipelines(tmp_path):
    pipe, other = build_class_pipeline(), build_class_pipeline()
    with torch.no_grad():
        for weight in other.transformer.parameters():
            weight.neg_()
    expected = [one(class_labels=1, generator=generators(0)).codes for one in (pipe, other)]
    for one in (pipe, other):
        offload(one, "block_level to disk", tmp_path)
    assert torch.equal(pipe(class_labels=1, generator=generators(0)).codes, expected[0])
    assert torch.equal(other(class_labels=1, generator=generators(0)).codes, expected[1])
    folders = [one.transformer._offload_folder.name for one in (pipe, other)]
    assert folders[0] != folders[1]
    pipe = build_class_pipeline()
    pipe.enable_group_offload(
        "cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path), exclude_modules="vq_model"
    )
    assert torch.equal(pipe(class_labels=1, generator=generators(0)).codes, expected[0])


@pytest.mark.parametrize("kind", ["model", "sequential", "block_level to disk", "leaf_level to disk"])
def test_an_encoder_that_has_a_decoder_is_offloaded_too(kind, tmp_path):
    torch.manual_seed(0)
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder")
             for name, size in {"layers": 1, "attention_heads": 2, "ffn_dim": 16}.items()}  # fmt: skip
    config = BartConfig(vocab_size=384, d_model=16, max_position_embeddings=32, **sizes)
    plain = build_text_pipeline()
    encoder = BartModel(config).eval()
    pipe = AutoregressiveImagePipeline(plain.vq_model, plain.transformer, encoder, ByT5Tokenizer())
    expected, mask = pipe.encode_prompt(["apple", "a red pear"])
    tokens = ByT5Tokenizer()(["apple"], return_tensors="pt")
    states = encoder.get_encoder()(**tokens).last_hidden_state
    torch.testing.assert_close(expected[:1, mask[0] == 1], states)
    offload(pipe, kind, tmp_path)
    assert torch.equal(pipe.encode_prompt(["apple", "a red pear"])[0], expected)


def test_a_compiled_step_and_offloading_refuse_each_other(tmp_path):
    for kind in ("model", "sequential", "block_level"):
        pipe = build_class_pipeline()
        offload(pipe, kind, tmp_path)
        with pytest.raises(ValueError, match="The weights are offloaded, which a compiled step can't be"):
            pipe.compile_step()
        pipe = build_class_pipeline()
        pipe.compile_step()
        offload(pipe, kind, tmp_path)
        with pytest.raises(ValueError, match="The weights are offloaded, which a compiled step can't be"):
            pipe(class_labels=1)


def test_blocks_of_the_tokenizer_go_one_by_one():
    model = build_vq_model()
    model.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1)
    hooked = {name for name, module in model.named_modules() if hasattr(module, "_diffusers_hook")}
    assert {"quantize.embedding", "encoder.down_blocks.0", "decoder.up_blocks.1"} <= hooked
