import json
import math
import pickle

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import (
    build_class_pipeline,
    build_text_encoder,
    build_text_pipeline,
    build_transformer,
    build_vq_model,
    generators,
)

from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.arguments import FieldError
from llamagen_hf.conditioning.text import encode_tokens
from llamagen_hf.llamagen.sampling import NEUTRAL


def codes_of(pipe, **arguments):
    return pipe(**{"generator": torch.Generator().manual_seed(0), "output_type": "codes"} | arguments).images


def test_two_lines(text_pipe):
    image = text_pipe("a red apple").images[0]
    assert isinstance(image, Image.Image) and image.size == (8, 8)


@pytest.mark.parametrize(
    "output_type, kind, shape",
    [
        ("np", np.ndarray, (2, 8, 8, 3)),
        ("pt", torch.Tensor, (2, 3, 8, 8)),
        ("codes", torch.Tensor, (2, 4, 4)),
    ],
)
def test_output_types(class_pipe, output_type, kind, shape):
    images = class_pipe(class_labels=[1, 2], output_type=output_type).images
    assert isinstance(images, kind) and images.shape == shape
    if output_type == "codes":
        assert images.dtype == torch.long
    else:
        assert 0 <= images.min() and images.max() <= 1
    (plain,) = class_pipe(class_labels=[1, 2], output_type=output_type, return_dict=False)
    assert len(plain) == 2


def test_images_are_the_decoded_codes(class_pipe):
    codes = codes_of(class_pipe, class_labels=[1, 2])
    images = codes_of(class_pipe, class_labels=[1, 2], output_type="pt")
    with torch.no_grad():
        expected = class_pipe.vq_model.decode_codes(codes).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(images, expected)


@pytest.mark.parametrize("label", [4, "golden retriever", "Golden Retriever", " golden retriever "])
def test_classes_by_id_and_name(class_pipe, label):
    assert torch.equal(codes_of(class_pipe, class_labels=label), codes_of(class_pipe, class_labels=[4]))


def test_classes_as_tensor_and_by_part_of_a_name(class_pipe):
    expected = codes_of(class_pipe, class_labels=[0, 1])
    assert torch.equal(codes_of(class_pipe, class_labels=torch.tensor([0, 1])), expected)
    assert torch.equal(codes_of(class_pipe, class_labels=["tinca tinca", "Goldfish"]), expected)


def test_prompt_equals_its_embeddings(text_pipe):
    prompts = ["a red apple", "hi"]
    embeds, mask = text_pipe.encode_prompt(prompts)
    assert embeds.shape == (2, 12, 16) and mask.sum(1).tolist() == [12, 3]  # bytes and an end mark, cut at 12
    assert not embeds[1, :9].any() and mask[1].tolist() == [0] * 9 + [1] * 3
    by_embeds = codes_of(text_pipe, prompt_embeds=embeds, prompt_attention_mask=mask)
    assert torch.equal(by_embeds, codes_of(text_pipe, prompt=prompts))
    without_mask = codes_of(text_pipe, prompt_embeds=embeds)
    assert torch.equal(
        without_mask, codes_of(text_pipe, prompt_embeds=embeds, prompt_attention_mask=torch.ones(2, 12))
    )


def test_prompts_are_cleaned(text_pipe):
    text_pipe.transformer.config.prompt_cleaning = "released"
    dirty = "A RED  apple\nhttps://example.com/apple.png"
    assert torch.equal(codes_of(text_pipe, prompt=dirty), codes_of(text_pipe, prompt="a red apple"))


def test_empty_prompt_draws(text_pipe):
    assert codes_of(text_pipe, prompt="").shape == (1, 4, 4)


def test_left_padding_equals_the_released_rearrangement():
    encoder = build_text_encoder()
    ids = torch.tensor([[5, 6, 7, 1, 0, 0], [9, 1, 0, 0, 0, 0]])
    mask = (ids > 0).long()
    states, moved = encode_tokens(encoder, ids, mask, length=8)
    with torch.no_grad():
        right = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    for row, count in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(states[row, 8 - count :], right[row, :count])
        assert not states[row, : 8 - count].any()
        assert moved[row].tolist() == [0] * (8 - count) + [1] * count


def test_any_encoder_of_transformers(text_pipe):
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 384, "num_attention_heads": 2, "num_hidden_layers": 1}
    bert = BertModel(BertConfig(hidden_size=16, intermediate_size=32, **sizes)).eval()
    t5 = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    for encoder in (bert, T5ForConditionalGeneration(t5).eval()):
        pipe = AutoregressiveImagePipeline(text_pipe.vq_model, text_pipe.transformer, encoder, text_pipe.tokenizer)
        pipe.set_progress_bar_config(disable=True)
        assert codes_of(pipe, prompt="a red apple").shape == (1, 4, 4)


def test_images_of_a_batch_depend_on_their_own_seed(text_pipe):
    prompts = ["apple", "a much longer prompt", "pear"]
    batch = codes_of(text_pipe, prompt=prompts, generator=generators(1, 2, 3))
    alone = codes_of(text_pipe, prompt=prompts[1], generator=generators(2))
    assert torch.equal(batch[1:2], alone)
    several = codes_of(text_pipe, prompt=prompts[1], num_images_per_prompt=2, generator=generators(2, 5))
    assert torch.equal(several[:1], alone) and not torch.equal(several[1:], alone)


def test_num_images_per_prompt_keeps_the_order(class_pipe):
    images = codes_of(class_pipe, class_labels=[1, 4], num_images_per_prompt=2, temperature=0)
    single = codes_of(class_pipe, class_labels=[1, 4], temperature=0)
    assert torch.equal(images, single.repeat_interleave(2, 0))


def test_the_global_random_state_is_left_alone(class_pipe):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    codes_of(class_pipe, class_labels=1)
    assert torch.equal(torch.rand(3), expected)


def test_sampling_defaults_of_the_checkpoint_apply_and_are_saved(class_pipe, tmp_path):
    greedy = codes_of(class_pipe, class_labels=[1, 2], temperature=0, guidance_scale=2.0)
    pipe = AutoregressiveImagePipeline(
        class_pipe.vq_model, class_pipe.transformer, sampling_defaults={"temperature": 0, "guidance_scale": 2.0}
    )
    pipe.save_pretrained(tmp_path)
    loaded = AutoregressiveImagePipeline.from_pretrained(tmp_path)
    assert torch.equal(codes_of(loaded, class_labels=[1, 2]), greedy)
    assert not torch.equal(codes_of(loaded, class_labels=[1, 2], temperature=1.0), greedy)


def test_callback_on_step_end(class_pipe):
    steps = []

    def callback(pipe, step, timestep, tensors):
        assert pipe is class_pipe
        steps.append((step, timestep, tensors["codes"].shape))
        return {}

    codes_of(class_pipe, class_labels=[1, 2], callback_on_step_end=callback)
    assert steps == [(i, i, (2, i + 1)) for i in range(16)]

    def zeros(pipe, step, timestep, tensors):
        return {"codes": torch.zeros_like(tensors["codes"])}

    assert not codes_of(class_pipe, class_labels=[1], callback_on_step_end=zeros).any()


def test_progress_bar_counts_codes(class_pipe, capsys):
    class_pipe.set_progress_bar_config(disable=False)
    class_pipe(class_labels=1)
    assert "16/16" in capsys.readouterr().err


def test_model_offload(text_pipe):
    expected = codes_of(text_pipe, prompt="apple", output_type="pt")
    text_pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(codes_of(text_pipe, prompt="apple", output_type="pt"), expected)


@pytest.mark.parametrize(
    "build, condition",
    [
        (build_class_pipeline, {"class_labels": [1]}),
        (build_text_pipeline, {"prompt_embeds": torch.ones(1, 12, 16)}),
    ],
)
def test_weights_on_the_meta_device_between_calls(build, condition):
    # Sequential offloading, by accelerate's call: diffusers' names the device "cpu:0", which accelerate can't handle.
    pipe = build()
    expected = codes_of(pipe, **condition)
    for component in (pipe.vq_model, pipe.transformer):
        cpu_offload(component, torch.device("cpu"))
    assert pipe.transformer.device.type == "meta"
    for _ in range(2):
        assert torch.equal(codes_of(pipe, **condition), expected)


def test_overflowing_logits_are_one_sentence(class_pipe):
    torch.nn.init.constant_(class_pipe.transformer.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="The logits are not finite in torch.float32; use bfloat16 or float32."):
        class_pipe(class_labels=1)


def test_dtype_moves(text_pipe, tmp_path):
    text_pipe.to(torch.bfloat16)
    assert codes_of(text_pipe, prompt="apple", output_type="pt").dtype == torch.bfloat16
    text_pipe.save_pretrained(tmp_path)
    assert AutoregressiveImagePipeline.from_pretrained(tmp_path).transformer.dtype == torch.float32
    half = AutoregressiveImagePipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert {half.vq_model.dtype, half.transformer.dtype, half.text_encoder.dtype} == {torch.float16}


def test_a_replaced_transformer_is_the_one_that_draws(class_pipe):
    before = codes_of(class_pipe, class_labels=[1, 2], temperature=0)
    other = build_transformer(num_hidden_layers=1)
    class_pipe.transformer = other
    assert not torch.equal(codes_of(class_pipe, class_labels=[1, 2], temperature=0), before)


@pytest.mark.slow
def test_compile_step_draws_the_same(class_pipe):
    """With the default of `CodeDecoder.compile`: kernels that are tried out, and frozen weights."""
    expected = codes_of(class_pipe, class_labels=[1, 2])
    class_pipe.compile_step()
    assert torch.equal(codes_of(class_pipe, class_labels=[1, 2]), expected)


CLASS_ERRORS = [
    ({}, "Pass exactly one of `prompt`, `class_labels` and `prompt_embeds`; found none of them."),
    ({"prompt": "a", "class_labels": 1}, "found `prompt` and `class_labels`."),
    ({"prompt": "a red apple"}, "This checkpoint is class-conditional: pass `class_labels`, not `prompt`."),
    ({"class_labels": "golden retreiver"}, "There is no class 'golden retreiver'; did you mean 'golden retriever'"),
    ({"class_labels": "crane"}, "Several classes are called 'crane': 2, 3; pass one of these ids."),
    ({"class_labels": 10}, "Class id 10 is out of range; this checkpoint has the classes 0..9."),
    ({"class_labels": [-1]}, "Class id -1 is out of range"),
    ({"class_labels": []}, "`class_labels` is an empty list"),
    ({"class_labels": 1.5}, "`class_labels` must be"),
    ({"class_labels": torch.tensor([1.7])}, "`class_labels` must be"),
    ({"class_labels": torch.tensor(11)}, "Class id 11 is out of range"),
    ({"class_labels": 1, "generator": 3}, "`generator` must be a torch.Generator or a list of them, not 3."),
    ({"class_labels": [None]}, "`class_labels` must be"),
    ({"class_labels": [1, 2], "generator": generators(1)}, "a list of 1, but 2 images are to be drawn."),
    ({"class_labels": 1, "temperature": -1.0}, "`temperature` is -1.0; expected"),
    ({"class_labels": 1, "temperature": math.nan}, "`temperature` is nan; expected"),
    ({"class_labels": 1, "guidance_scale": -2.0}, "`guidance_scale` is -2.0; expected"),
    ({"class_labels": 1, "guidance_scale": math.nan}, "`guidance_scale` is nan; expected"),
    ({"class_labels": 1, "top_p": -0.5}, "`top_p` is -0.5; expected"),
    ({"class_labels": 1, "top_p": math.nan}, "`top_p` is nan; expected"),
    ({"class_labels": 1, "height": 16}, "`height` is 16; this checkpoint draws 8x8 pixels only."),
    ({"class_labels": 1, "width": 4}, "`width` is 4; this checkpoint draws 8x8 pixels only."),
    ({"class_labels": 1, "output_type": "jpg"}, "`output_type` is 'jpg'; expected 'pil', 'np', 'pt' or 'codes'."),
    ({"class_labels": 1, "num_images_per_prompt": 0}, "`num_images_per_prompt` is 0; expected"),
    ({"class_labels": 1, "callback_on_step_end_tensor_inputs": ["latents"]}, "names .'latents'."),
]


@pytest.mark.parametrize("arguments, message", CLASS_ERRORS)
def test_class_errors_are_one_sentence(class_pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        class_pipe(**arguments)
    assert "\n" not in str(caught.value)


TEXT_ERRORS = [
    ({"class_labels": 1}, "This checkpoint is text-conditional: pass `prompt`, not `class_labels`."),
    ({"prompt": []}, "`prompt` is an empty list; pass at least one prompt."),
    ({"prompt": 5}, "`prompt` must be a string or a list of strings, not int."),
    ({"prompt": ["a", None]}, "`prompt` must be a string or a list of strings"),
    ({"prompt_embeds": torch.zeros(1, 12, 8)}, r"has shape \(1, 12, 8\); expected \(batch, 12, 16\)."),
    ({"prompt_embeds": torch.zeros(12, 16)}, r"has shape \(12, 16\); expected \(batch, 12, 16\)."),
    (
        {"prompt_embeds": torch.zeros(1, 12, 16), "prompt_attention_mask": torch.ones(1, 5)},
        r"`prompt_attention_mask` has shape \(1, 5\); expected \(1, 12\).",
    ),
    ({"prompt_embeds": [[0.0]]}, "`prompt_embeds` must be a tensor, not list."),
    ({"prompt": "a", "prompt_attention_mask": torch.ones(1, 12)}, "goes with `prompt_embeds`"),
]


@pytest.mark.parametrize("arguments, message", TEXT_ERRORS)
def test_text_errors_are_one_sentence(text_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        text_pipe(**arguments)


def test_prompt_without_text_encoder_is_one_sentence():
    pipe = AutoregressiveImagePipeline(build_vq_model(), build_transformer(conditioning="text"))
    with pytest.raises(ValueError, match="no text encoder and tokenizer"):
        pipe("a red apple")


def test_class_names_without_names_is_one_sentence():
    pipe = AutoregressiveImagePipeline(build_vq_model(), build_transformer(id2label=None))
    with pytest.raises(ValueError, match="no class names, so 'pear' can't be found; pass a class id."):
        pipe(class_labels="pear")


def test_components_that_do_not_belong_together():
    with pytest.raises(ValueError, match="draws 64 codes, but the tokenizer has 32"):
        AutoregressiveImagePipeline(build_vq_model(num_vq_embeddings=32), build_transformer())
    narrow = build_transformer(conditioning="text", condition_dim=8)
    with pytest.raises(ValueError, match="states are 16 wide, but the transformer takes 8"):
        AutoregressiveImagePipeline(build_vq_model(), narrow, build_text_encoder())
    with pytest.raises(ValueError, match="`sampling_defaults` has .'guidence_scale'.; it may have"):
        AutoregressiveImagePipeline(build_vq_model(), build_transformer(), sampling_defaults={"guidence_scale": 3})


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(OSError, match="is not a checkpoint: it has no model_index.json."):
        AutoregressiveImagePipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="There is no folder"):
        AutoregressiveImagePipeline.from_pretrained(str(tmp_path / "absent"))


@pytest.mark.parametrize("component", ["vq_model", "transformer", "text_encoder"])
def test_truncated_or_incomplete_weights(text_pipe, tmp_path, component):
    text_pipe.save_pretrained(tmp_path)
    (path,) = (tmp_path / component).glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=f"damaged: {component}/{path.name}") as caught:
        AutoregressiveImagePipeline.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(OSError, match=f"The weights of {component} in .* miss "):
        AutoregressiveImagePipeline.from_pretrained(tmp_path)


def test_saved_index_names_the_package_only(class_pipe, tmp_path):
    class_pipe.save_pretrained(tmp_path / "one")
    loaded = AutoregressiveImagePipeline.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    index = json.loads((tmp_path / "two" / "model_index.json").read_text())
    assert index["vq_model"] == ["llamagen_hf", "LlamaGenVQModel"]
    for path in (tmp_path / "two").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_errors_say_which_argument_they_are_about():
    text, classes = build_text_pipeline(), build_class_pipeline()
    for pipe, arguments, field in [
        (text, {}, "prompt"),
        (text, {"class_labels": 1}, "class_labels"),
        (text, {"prompt": "a", "height": 9}, "height"),
        (text, {"prompt": "a", "keep_rows": 1}, "keep_rows"),
        (text, {"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt"),
        (text, {"prompt": "a", "num_candidates": 2, "scorer": "likelihood"}, "scorer"),
        (text, {"prompt_embeds": torch.zeros(1, 2)}, "prompt_embeds"),
        (text, {"prompt": "a", "prefix_codes": torch.tensor([[-1]])}, "prefix_codes"),
        (classes, {"prompt": "a"}, "prompt"),
        (classes, {"class_labels": "unicorn"}, "class_labels"),
        (classes, {"class_labels": 99}, "class_labels"),
        *[(classes, {"class_labels": 1, name: -2}, name) for name in NEUTRAL],
    ]:
        with pytest.raises(FieldError) as caught:
            pipe(**arguments)
        again = pickle.loads(pickle.dumps(caught.value))  # as from the worker of a pool
        assert caught.value.field == again.field == field and str(caught.value) == str(again)
        assert str(again).endswith((".", "?")) and isinstance(again, ValueError)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor, np.array])
def test_numbers_of_numpy_and_torch_are_numbers(class_pipe, number, tmp_path):
    plain = {"top_k": 9, "guidance_interval": 3, "num_images_per_prompt": 2, "height": 8}
    expected = class_pipe(class_labels=[1], temperature=0.5, generator=generators(0, 1), **plain)
    settings = {name: number(value) for name, value in plain.items()}
    for labels in (number(1), [number(1)], np.array([1]), torch.tensor([1])):
        output = class_pipe(class_labels=labels, temperature=np.float32(0.5), generator=generators(0, 1), **settings)
        assert torch.equal(output.codes, expected.codes)
        assert json.loads(json.dumps(output.parameters)) == expected.parameters
    assert class_pipe.get_class_ids(number(1)).tolist() == [65]
    *_, last = class_pipe.stream(class_labels=number(1), preview_every=number(4), generator=generators(0))
    again = class_pipe.variation(last.codes.view(1, 4, 4), number(4), class_labels=1, generator=generators(0))
    assert torch.equal(again.codes.flatten(), last.codes.flatten())
    damaged = expected.parameters[1] | {"seed": np.int64(1), "batch_size": np.int32(2), "top_k": np.int8(9)}
    assert torch.equal(class_pipe.redraw(damaged).codes, expected.codes[1:])
    kwargs = class_pipe.components | {"sampling_defaults": {"top_k": number(5)}}
    AutoregressiveImagePipeline(**kwargs).save_pretrained(tmp_path)
    assert AutoregressiveImagePipeline.from_pretrained(tmp_path).config.sampling_defaults == {"top_k": 5}


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": np.float32(3.5)},
        {"top_k": True},
        {"temperature": np.bool_(True)},
        {"guidance_interval": True},
        {"guidance_scale": np.array([4.0, 2.0])},
        {"class_labels": np.bool_(True)},
        {"class_labels": torch.tensor([True])},
        {"class_labels": np.array([1.0])},
        {"num_images_per_prompt": np.bool_(True)},
        {"prefix_codes": None, "image": torch.rand(1, 3, 8, 8), "keep_rows": True},
        {"height": True},
    ],
)
def test_what_is_no_number_of_the_kind_is_refused(class_pipe, settings):
    with pytest.raises(ValueError, match=f"`{list(settings)[-1]}` "):
        class_pipe(**{"class_labels": 1} | settings)


def test_streams_take_their_condition_as_calls_do(class_pipe):
    *_, last = class_pipe.stream(None, 1, generator=generators(0))
    assert torch.equal(last.output.codes, class_pipe(None, 1, generator=generators(0)).codes)


def test_strings_of_digits_are_ids_where_no_class_is_called_so(class_pipe):
    assert class_pipe.get_class_ids(["7", " 7 ", "thing 7", 7]).tolist() == [71] * 4
    class_pipe.transformer.config.id2label = {0: "7", 1: "8, eight"} | {i: f"thing {i}" for i in range(2, 10)}
    assert class_pipe.get_class_ids(["7", 7, "8", "9"]).tolist() == [64, 71, 65, 73]
    class_pipe.transformer.config.id2label = None
    assert class_pipe.get_class_ids("7").tolist() == [71]
    with pytest.raises(ValueError, match="Class id 12 is out of range"):
        class_pipe.get_class_ids("12")
