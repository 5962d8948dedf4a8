import argparse
import json
import pickle

import pytest
import torch
from parity import SIZES, goldens, released_state_dict, released_transformer
from safetensors.torch import save_file

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenConfig, LlamaGenForConditionalGeneration
from llamagen_hf.llamagen.conversion import (
    VARIANTS,
    _released_shapes,
    convert_checkpoint,
    convert_transformer_state_dict,
    load_released,
    transformer_from_released,
    vq_model_from_released,
)
from llamagen_hf.llamagen.decoding import CodeDecoder


def test_class_logits_and_loss_equal_the_released_ones():
    model, golden = released_transformer("c2i_tiny"), goldens("c2i_tiny")
    input_ids = torch.cat([96 + golden["class_labels"][:, None], golden["codes"][:, :-1]], dim=1)
    with torch.no_grad():
        output = model(input_ids, labels=golden["codes"])
    torch.testing.assert_close(output.logits, golden["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, golden["loss"], atol=1e-4, rtol=0)


def test_text_logits_and_loss_equal_the_released_ones():
    model, golden = released_transformer("t2i_tiny"), goldens("t2i_tiny")
    with torch.no_grad():
        output = model(
            golden["codes"][:, :-1],
            prompt_embeds=golden["prompt_embeds"],
            prompt_attention_mask=golden["prompt_attention_mask"],
            labels=golden["codes"],
        )
    torch.testing.assert_close(output.logits, golden["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, golden["loss"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["c2i_tiny", "t2i_tiny"])
@pytest.mark.parametrize("scale, interval, key", [(1, -1, "1"), (3, -1, "3"), (3, 5, "3_interval5")])
def test_greedy_codes_equal_the_released_ones(name, scale, interval, key):
    model, golden = released_transformer(name), goldens(name)
    if name == "c2i_tiny":
        condition = {"class_ids": 96 + golden["generate_class_labels"]}
    else:
        condition = {key: golden[key] for key in ("prompt_embeds", "prompt_attention_mask")}
    codes = CodeDecoder(model)(
        torch.zeros(3, 16), **condition, guidance_scale=scale, guidance_interval=interval, temperature=0
    )
    assert torch.equal(codes, golden[f"greedy_guidance{key}"])


@pytest.fixture(scope="module")
def released_vq16():
    return released_state_dict("vq16_64")


@pytest.fixture(scope="module")
def vq16(released_vq16):
    return vq_model_from_released(released_vq16)


def test_vq_codes_and_pixels_equal_the_released_ones(vq16):
    golden = goldens("vq16_64")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(103)) * 2 - 1
    with torch.no_grad():
        output = vq16(image)
        decoded = vq16.decode_codes(golden["codes"])
    assert torch.equal(output.codes, golden["indices"])
    torch.testing.assert_close(output.quantized, golden["quantized"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.sample[..., ::5, ::5], golden["reconstruction_every5"], atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded[..., ::5, ::5], golden["decoded_every5"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.vq_loss, golden["vq_loss"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.commit_loss, golden["commit_loss"], atol=1e-4, rtol=0)


def test_vq8_sizes_are_read_off_the_shapes(released_vq16):
    # VQ-8 is VQ-16 without the encoder's second level and the decoder's last.
    released = {}
    for key, value in released_vq16.items():
        parts = key.split(".")
        if key.startswith(("encoder.conv_blocks.1.", "decoder.conv_blocks.4.", "decoder.conv_blocks.3.upsample.")):
            continue
        if key.startswith("encoder.conv_blocks.") and parts[2] != "0":
            parts[2] = str(int(parts[2]) - 1)
        released[".".join(parts)] = value
    model = vq_model_from_released(released)
    assert model.config.block_out_channels == (128, 256, 256, 512)
    assert model.downsample_factor == 8
    assert model.encode(torch.zeros(1, 3, 16, 24)).codes.shape == (1, 2, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("layers.1.attention.wo.weight"), "missing layers.1.attention.wo.weight"),
        (lambda d: d.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda d: d.update({"norm.weight": torch.zeros(3)}), r"norm.weight is \(3,\), expected \(64,\)"),
    ],
)
def test_weights_that_do_not_fit_are_listed_by_name(change, message):
    released = released_state_dict("c2i_tiny")
    change(released)
    with pytest.raises(ValueError, match=message):
        convert_transformer_state_dict(released, LlamaGenConfig(**SIZES, num_classes=10))


def test_vq_weights_that_do_not_fit_are_listed_by_released_name(released_vq16):
    released = dict(released_vq16)
    del released["decoder.conv_blocks.0.attn.1.q.weight"]
    with pytest.raises(ValueError, match="missing decoder.conv_blocks.0.attn.1.q.weight"):
        vq_model_from_released(released)
    with pytest.raises(ValueError, match="not those of a LlamaGen tokenizer"):
        vq_model_from_released({"weight": torch.zeros(1)})


@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
def test_weights_are_found_in_every_released_layout(tmp_path, wrapper):
    released = {"norm.weight": torch.arange(3.0)}
    torch.save({wrapper: released, "steps": 3} if wrapper else released, tmp_path / "file.pt")
    assert torch.equal(load_released(tmp_path / "file.pt")["norm.weight"], torch.arange(3.0))


class RunsCode:
    def __reduce__(self):
        return (print, ("the pickle ran",))


def test_a_pickle_with_code_is_refused_unrun(tmp_path, capsys):
    torch.save({"model": {}, "args": RunsCode()}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match="^file.pt holds pickled code beside its weights, so it is not loaded.$"):
        load_released(tmp_path / "file.pt")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_file_is_one_sentence(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    if suffix == ".pt":
        torch.save({"w": torch.zeros(1000)}, path)
    else:
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match=f"^file{suffix} is damaged or not a checkpoint.$"):
        load_released(path)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module._fsdp_wrapped_module."]
)
def test_prefixes_of_wrappers_are_dropped(tmp_path, prefix):
    torch.save({"model": {f"{prefix}layers.0._orig_mod.weight": torch.ones(1)}}, tmp_path / "a.pt")
    save_file({f"{prefix}layers.0.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    assert list(load_released(tmp_path / "a.pt")) == list(load_released(tmp_path / "a.safetensors"))
    assert list(load_released(tmp_path / "a.pt")) == ["layers.0.weight"]
    torch.save({f"{prefix}w": torch.ones(1), "w": torch.ones(1)}, tmp_path / "both.pt")
    with pytest.raises(ValueError, match="^both.pt holds weights twice, with and without a prefix such as module.$"):
        load_released(tmp_path / "both.pt")


def test_averaged_weights_are_taken_and_it_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("llamagen_hf.llamagen.conversion.logger.warning", said.append)
    args = argparse.Namespace(ema=True)
    for ema, value in (({"module.w": torch.ones(1)}, 1), ({}, 0)):
        content = {"model": {"w": torch.zeros(1)}, "ema": ema, "optimizer": {"state": {}}, "steps": 5, "args": args}
        torch.save(content, tmp_path / "vq.pt")
        assert load_released(tmp_path / "vq.pt") == {"w": torch.full((1,), value)}
    assert said == ["vq.pt holds averaged weights (ema); using those."]


def test_a_converted_text_checkpoint_cleans_by_the_released_rules():
    shapes = _released_shapes(LlamaGenConfig(**VARIANTS["B"], conditioning="text", vocab_size=64, condition_dim=8))
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    config = transformer_from_released(state, "B", grid_size=4).config
    assert config.prompt_cleaning == "released" and config.condition_rotary == "zero"


@pytest.fixture(scope="module")
def released_folder(tmp_path_factory, released_vq16):
    """A released tokenizer and a tiny generator that fits it, as files: 290 MB, so they are written once."""
    folder = tmp_path_factory.mktemp("released")
    torch.save({"model": released_vq16}, folder / "vq.pt")
    shapes = {key: tuple(value.shape) for key, value in released_state_dict("c2i_tiny").items()}
    shapes |= {"tok_embeddings.weight": (256, 64), "output.weight": (256, 64)}
    shapes |= {f"layers.{i}.feed_forward.{w}.weight": (256, 64) for i in (0, 1) for w in ("w1", "w3")}
    shapes |= {f"layers.{i}.feed_forward.w2.weight": (64, 256) for i in (0, 1)}
    generator = {key: torch.randn(shape) * 0.1 for key, shape in shapes.items()}
    torch.save({"model": generator, "freqs_cis": 0}, folder / "c2i.pt")
    return folder


@pytest.fixture
def released_files(released_folder, monkeypatch):
    monkeypatch.setitem(VARIANTS, "tiny", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
    return released_folder


def test_a_converted_folder_draws(released_files, tmp_path):
    output = tmp_path / "out"
    labels = {i: f"class {i}" for i in range(10)}
    convert_checkpoint(
        released_files / "vq.pt", released_files / "c2i.pt", "tiny", image_size=64, output=output, id2label=labels
    )
    pipe = AutoregressiveImagePipeline.from_pretrained(output)
    assert pipe(class_labels="Class 3").images[0].size == (64, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert str(tmp_path) not in (output / "model_index.json").read_text()
    assert json.loads((output / "transformer" / "config.json").read_text())["grid_size"] == 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"variant": "B"}, "64 wide with 2 layers.*variant B is 768 wide with 12"),
        ({"variant": "S"}, "There is no variant 'S'"),
        ({"image_size": 70}, "70 is not a multiple of the tokenizer's 16"),
        ({"text": True}, "class-conditional, not text-conditional"),
        ({"transformer_checkpoint": "none.pt"}, "There is no file 'none.pt'"),
        ({"id2label": {i: "name" for i in range(1, 11)}}, "The 10 class names must have the ids 0..9"),
        ({"id2label": {0: "one"}}, "The 1 class names must have the ids 0..9, one name per class."),
    ],
)
def test_a_failed_conversion_leaves_nothing(released_files, tmp_path, change, message):
    arguments = {
        "vq_checkpoint": released_files / "vq.pt",
        "transformer_checkpoint": released_files / "c2i.pt",
        "variant": "tiny",
        "image_size": 64,
        "output": tmp_path / "out",
    }
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(**arguments | change)
    assert not list(tmp_path.iterdir())
    assert sorted(path.name for path in released_files.iterdir()) == ["c2i.pt", "vq.pt"]


def test_output_that_exists_or_cannot_be_written(released_files):
    arguments = (released_files / "vq.pt", released_files / "c2i.pt", "tiny", 64)
    with pytest.raises(ValueError, match="already exists"):
        convert_checkpoint(*arguments, output=released_files)
    with pytest.raises(ValueError, match="can't be written"):
        convert_checkpoint(*arguments, output=released_files / "vq.pt" / "out")


def test_rotary_pairs_of_heads_100_wide_are_reordered():
    # LlamaGen-3B: 3200 over 32 heads, here two of them. Row i of a head turns with row i ^ 1 there, i +- 50 here.
    config = LlamaGenConfig(
        vocab_size=32,
        hidden_size=200,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_classes=1,
    )
    released = {key: torch.zeros(shape) for key, shape in _released_shapes(config).items()}
    released["layers.0.attention.wqkv.weight"] = torch.arange(600.0)[:, None].expand(600, 200).clone()
    converted = convert_transformer_state_dict(released, config)
    for offset, name in ((0, "q_proj"), (200, "k_proj")):
        rows = converted[f"model.layers.0.self_attn.{name}.weight"][:, 0]
        for head in (0, 100):
            evens = torch.arange(offset + head, offset + head + 100, 2.0)
            assert torch.equal(rows[head : head + 50], evens)
            assert torch.equal(rows[head + 50 : head + 100], evens + 1)
    assert torch.equal(converted["model.layers.0.self_attn.v_proj.weight"][:, 0], torch.arange(400.0, 600.0))


# Table 1 and section 3.1 of the paper, and the comments of the released code.
@pytest.mark.parametrize("variant, millions", [
    ("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("XXXL", 3900), ("1B", 1200), ("3B", 3100), ("7B", 6600),
])  # fmt: skip
def test_variants_have_the_released_number_of_parameters(variant, millions):
    with torch.device("meta"):
        model = LlamaGenForConditionalGeneration(LlamaGenConfig(**VARIANTS[variant]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"version https://git-lfs", pickle.dumps({"a": 1})]
)
def test_files_of_another_kind_are_called_damaged(tmp_path, content):
    (tmp_path / "file.pt").write_bytes(content)
    with pytest.raises(ValueError, match="^file.pt (is damaged or not a checkpoint|holds no model weights).$"):
        load_released(tmp_path / "file.pt")


def test_a_bare_pickle_with_code_is_refused_unrun(tmp_path, capsys):
    (tmp_path / "file.pt").write_bytes(pickle.dumps({"model": RunsCode()}, protocol=2))
    with pytest.raises(ValueError, match="holds pickled code"):
        load_released(tmp_path / "file.pt")
    assert "ran" not in capsys.readouterr().out


def test_weights_of_a_wrong_rank_are_named(released_vq16):
    with pytest.raises(ValueError, match=r"quantize.embedding.weight is \(3,\), expected 2 dimensions"):
        vq_model_from_released(released_vq16 | {"quantize.embedding.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"tok_embeddings.weight is \(3,\), expected 2 dimensions"):
        transformer_from_released({"tok_embeddings.weight": torch.zeros(3)}, "B", 16)


def test_text_generator_from_released_reads_condition_sizes():
    released = released_state_dict("t2i_tiny")
    VARIANTS["tiny"] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 192}
    try:
        model = transformer_from_released(released, "tiny", grid_size=4)
    finally:
        del VARIANTS["tiny"]
    assert (model.config.condition_length, model.config.condition_dim) == (120, 24)
