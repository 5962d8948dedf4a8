import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import build_transformer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llamagen_hf import LlamaGenConfig, LlamaGenForConditionalGeneration, LlamaGenModel
from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.modeling import rotary_2d


def class_inputs(config, batch=2):
    codes = torch.randint(config.vocab_size, (batch, config.num_codes))
    classes = config.vocab_size + torch.arange(batch)[:, None]
    return torch.cat([classes, codes[:, :-1]], dim=1), codes


def text_inputs(config, batch=2):
    mask = torch.ones(batch, config.condition_length, dtype=torch.long)
    mask[0, :5] = 0
    embeds = torch.randn(batch, config.condition_length, config.condition_dim)
    codes = torch.randint(config.vocab_size, (batch, config.num_codes))
    return codes, {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def test_rotary_angles_turn_with_row_and_column():
    config = build_transformer().config
    cos, sin = rotary_2d(config, torch.arange(17)[None])
    assert cos.shape == (1, 17, 16)
    assert not cos[0, 0].any() and not sin[0, 0].any()  # the condition
    row, column = 2, 3
    angles = cos[0, 1 + row * 4 + column]
    frequencies = [10000 ** -(i / 8) for i in (0, 2, 4, 6)]  # half of a head of 16 turns with the row
    by_row = [math.cos(row * f) for f in frequencies]
    by_column = [math.cos(column * f) for f in frequencies]
    torch.testing.assert_close(angles, torch.tensor((by_row + by_column) * 2))


def test_loss_is_the_cross_entropy_of_exactly_the_labels():
    model = build_transformer()
    input_ids, codes = class_inputs(model.config)
    output = model(input_ids, labels=codes)
    assert output.logits.shape == (2, 16, 64)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.reshape(-1, 64), codes.reshape(-1)))
    # The last code as an input adds a prediction past the image, which the loss leaves out.
    longer = model(torch.cat([input_ids, codes[:, -1:]], dim=1), labels=codes)
    torch.testing.assert_close(longer.loss, output.loss)
    with pytest.raises(ValueError, match="`labels` holds 16 codes, but the inputs predict only 15."):
        model(input_ids[:, :-1], labels=codes)


def test_text_logits_start_at_the_last_word():
    model = build_transformer(conditioning="text")
    codes, condition = text_inputs(model.config)
    output = model(codes[:, :-1], **condition, labels=codes)
    assert output.logits.shape == (2, 16, 64)
    assert model(**condition).logits.shape == (2, 1, 64)
    torch.testing.assert_close(model(**condition).logits, output.logits[:, :1], atol=1e-5, rtol=1e-5)


def test_padding_is_never_read():
    model = build_transformer(conditioning="text")
    codes, condition = text_inputs(model.config)
    before = model(codes, **condition).logits
    condition["prompt_embeds"][0, :5] = 1e3
    torch.testing.assert_close(model(codes, **condition).logits, before)
    condition["prompt_embeds"][0, 5] = 1e3
    assert not torch.allclose(model(codes, **condition).logits[0], before[0])


def test_rotary_of_the_condition_is_zero_or_identity():
    positions = torch.arange(12 + 16)[None]
    for kind, expected in (("zero", 0.0), ("identity", 1.0)):
        config = build_transformer(conditioning="text", condition_rotary=kind).config
        cos, sin = rotary_2d(config, positions)
        assert (cos[0, :12] == expected).all() and (sin[0, :12] == 0).all()
        torch.testing.assert_close(cos[0, 12:].square() + sin[0, 12:].square(), torch.ones(16, 16))


def test_words_are_told_apart_only_with_identity():
    """Without rotation all words have the same key, so only the mean of their values is heard."""
    for kind in ("zero", "identity"):
        model = build_transformer(conditioning="text", condition_rotary=kind, num_hidden_layers=1)
        _, condition = text_inputs(model.config)
        condition["prompt_attention_mask"][:] = 1
        model.set_attn_implementation("eager")
        (weights,) = model(torch.zeros(2, 3, dtype=torch.long), **condition, output_attentions=True).attentions
        to_words = weights[:, :, 12:, :12]  # from codes
        assert ((to_words.amax(-1) - to_words.amin(-1)).max() < 1e-6) == (kind == "zero")


def test_checkpoints_saved_before_the_choice_are_zero_and_new_text_models_identity():
    assert LlamaGenConfig(conditioning="text").condition_rotary == "identity"
    assert LlamaGenConfig().condition_rotary == "zero"
    saved = LlamaGenConfig(conditioning="text").to_dict()
    assert LlamaGenConfig.from_dict(saved).condition_rotary == "identity"
    del saved["condition_rotary"]
    assert LlamaGenConfig.from_dict(saved).condition_rotary == "zero"


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_cached_equals_uncached(conditioning):
    model = build_transformer(conditioning=conditioning)
    if conditioning == "class":
        ids, _ = class_inputs(model.config)
        first, rest, mask = {"input_ids": ids[:, :1]}, ids[:, 1:], None
        full = model(ids).logits
    else:
        rest, first = text_inputs(model.config)
        full = model(rest, **first).logits
        mask = first["prompt_attention_mask"]
    output = model(**first, use_cache=True)
    logits = [output.logits]
    for i in range(rest.shape[1]):
        if mask is not None:
            mask = F.pad(mask, (0, 1), value=1)
        output = model(rest[:, i : i + 1], past_key_values=output.past_key_values, attention_mask=mask, use_cache=True)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), full, atol=1e-5, rtol=1e-4)


def test_eager_attention_equals_sdpa():
    model = build_transformer(conditioning="text")
    codes, condition = text_inputs(model.config)
    sdpa = model(codes, **condition).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(codes, **condition).logits, sdpa, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_our_loop(cache):
    model = build_transformer()
    classes = torch.tensor([66, 70])
    options = {"do_sample": False, "cache_implementation": cache}
    ours = CodeDecoder(model)(torch.zeros(2, 16), class_ids=classes, temperature=0)
    assert torch.equal(model.generate(classes[:, None], **options)[:, 1:], ours)

    null = torch.full((2, 1), model.config.null_class_id)
    guided = CodeDecoder(model)(torch.zeros(2, 16), class_ids=classes, temperature=0, guidance_scale=3.0)
    theirs = model.generate(classes[:, None], negative_prompt_ids=null, guidance_scale=3.0, **options)
    assert torch.equal(theirs[:, 1:], guided)
    assert not torch.equal(guided, ours)


def test_condition_dropout_draws_the_null_condition():
    model = build_transformer(condition_dropout=1.0, embedding_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0)
    ids, _ = class_inputs(model.config)
    null = ids.clone()
    null[:, 0] = model.config.null_class_id
    expected = model(null).logits
    torch.testing.assert_close(model.train()(ids).logits, expected)

    model = build_transformer(
        conditioning="text", condition_dropout=1.0, embedding_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0
    )
    codes, condition = text_inputs(model.config)
    null = condition | {"prompt_embeds": model.model.uncond_embedding(2)}
    expected = model(codes, **null).logits
    torch.testing.assert_close(model.train()(codes, **condition).logits, expected)


@pytest.mark.parametrize("name", ["embedding_dropout", "residual_dropout", "ffn_dropout", "attention_dropout"])
def test_each_dropout_acts_in_training_only(name):
    off = dict.fromkeys(
        ["embedding_dropout", "residual_dropout", "ffn_dropout", "attention_dropout", "condition_dropout"], 0.0
    )
    model = build_transformer(**off | {name: 0.5})
    ids, _ = class_inputs(model.config)
    expected = model(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(model.train()(ids).logits, expected)


def test_gradient_checkpointing_changes_no_gradient():
    model = build_transformer(conditioning="text", condition_dropout=0.0, embedding_dropout=0.0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    codes, condition = text_inputs(model.config)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(codes[:, :-1], **condition, labels=codes, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert model.model.layers[0].gradient_checkpointing


def test_auto_classes_find_the_saved_model(tmp_path):
    model = build_transformer()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LlamaGenConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), LlamaGenModel)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, LlamaGenForConditionalGeneration)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    ids, _ = class_inputs(model.config)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_hidden_states_and_attentions_come_on_request():
    model = build_transformer()
    model.set_attn_implementation("eager")
    ids, _ = class_inputs(model.config)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    assert output.attentions[0].shape == (2, 2, 16, 16)


def test_tensor_parallel_plan_covers_every_layer_matrix():
    model = build_transformer()
    plan = model._tp_plan
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("layers" in name or "lm_head" in name):
            pattern = name.removesuffix(".weight").replace("layers.0", "layers.*").replace("layers.1", "layers.*")
            assert pattern in plan, name


def test_bfloat16_logits_are_float32_and_near():
    """Within what 8 bits of mantissa give: the released arithmetic's own error is of this size, 1e-2 at two layers."""
    model = build_transformer(initializer_range=0.05)
    ids, _ = class_inputs(model.config)
    exact = model(ids).logits
    rounded = model.to(torch.bfloat16)(ids).logits
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "text-conditional: pass `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 12, 9)}, r"has shape \(1, 12, 9\); expected \(batch, 12, 16\)"),
        (
            {"prompt_embeds": torch.zeros(1, 12, 16), "prompt_attention_mask": torch.ones(1, 11)},
            r"has shape \(1, 11\); expected \(1, 12\)",
        ),
    ],
)
def test_text_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(ValueError, match=message):
        build_transformer(conditioning="text")(torch.zeros(1, 3, dtype=torch.long), **inputs)


def test_text_mode_generate_without_a_prompt_is_one_sentence():
    with pytest.raises(ValueError, match="text-conditional: pass `prompt_embeds`"):
        build_transformer(conditioning="text").generate(torch.zeros(1, 1, dtype=torch.long))


def test_class_model_refuses_text():
    with pytest.raises(ValueError, match="class-conditional"):
        build_transformer()(prompt_embeds=torch.zeros(1, 12, 16))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "`hidden_size` .30. must be a multiple"),
        ({"hidden_size": 24, "num_attention_heads": 4}, "divisible by 4, but `head_dim` is 6"),
        ({"conditioning": "image"}, "expected 'class' or 'text'"),
        ({"condition_length": 5}, "A class takes one position"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        LlamaGenConfig(**sizes)


def test_released_defaults():
    config = LlamaGenConfig()
    assert (config.intermediate_size, config.head_dim, config.null_class_id) == (2048, 64, 17384)
    assert LlamaGenConfig(conditioning="text").condition_length == 120
    assert LlamaGenConfig(hidden_size=3200, num_attention_heads=32).intermediate_size == 8704
