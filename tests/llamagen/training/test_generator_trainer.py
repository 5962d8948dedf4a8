"""Generator training: conditions, what it saves, what it starts from, and adapters."""

import json
import math
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_text_encoder as build_tiny_text_encoder
from tiny import build_transformer
from tiny_stages import build_clip
from tiny_training import draw_shape, generator_config, tokenizer_config, write_shapes
from transformers import ByT5Tokenizer, CLIPTextModel


pytest.importorskip("datasets", reason="the training extra is not installed")

from datasets import Dataset  # noqa: E402

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenConfig  # noqa: E402
from llamagen_hf.clip import embed_images, load_clip  # noqa: E402
from llamagen_hf.conditioning.cache import decode_states  # noqa: E402
from llamagen_hf.data.loader import batches_once  # noqa: E402
from llamagen_hf.data.samples import BadRow  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.files import replace_result  # noqa: E402
from llamagen_hf.llamagen.modeling import LlamaGenForConditionalGeneration  # noqa: E402
from llamagen_hf.llamagen.training.codes import CodeCollator, CodeSamples, load_codes, read_codes_info  # noqa: E402
from llamagen_hf.llamagen.training.extraction import CodeExtractionConfig, extract_codes  # noqa: E402
from llamagen_hf.llamagen.training.generator_models import (  # noqa: E402
    ConditionToCodes,
    flops_per_image,
    mean_loss,
)
from llamagen_hf.llamagen.training.generator_trainer import (  # noqa: E402
    GeneratorTask,
    codebook_vectors,
    train_generator,
)
from llamagen_hf.llamagen.training.vq_trainer import train_tokenizer  # noqa: E402
from llamagen_hf.training.record import read_facts  # noqa: E402
from llamagen_hf.training.single_model import parameter_groups  # noqa: E402
from llamagen_hf.training.text_encoder import build_text_encoder, pretrain_text_encoder  # noqa: E402
from llamagen_hf.training.trainer import Trainer  # noqa: E402


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Tokenizer, codes with stored text states, and a text- and a class-conditional pipeline."""
    folder = tmp_path_factory.mktemp("stages")
    data = write_shapes(folder / "shapes")
    train_tokenizer(data, tokenizer_config(folder / "tokenizer"))
    build_tiny_text_encoder().save_pretrained(folder / "encoder")
    ByT5Tokenizer().save_pretrained(folder / "encoder")
    extract_codes(
        data,
        CodeExtractionConfig(
            str(folder / "tokenizer"), str(folder / "codes"), num_crops=2,
            text_encoder=str(folder / "encoder"), text_columns=["caption"], condition_length=8,
        ),
    )  # fmt: skip
    metrics = train_generator(config_of(folder, folder / "text"))
    train_generator(config_of(folder, folder / "class", conditioning="class"))
    return folder, metrics


def config_of(folder, output_dir, **kwargs):
    return generator_config(output_dir, folder / "tokenizer", folder / "codes", **kwargs)


def set_up(config) -> GeneratorTask:
    """The task of a training that has not taken its first step."""
    trainer = Trainer(config, GeneratorTask(config))
    trainer.setup()
    return trainer.task


def weights_of(folder):
    return load_file(folder / "transformer" / "model.safetensors")


def test_text_training_ends_in_a_pipeline_that_generates(stages):
    folder, metrics = stages
    assert 0 < metrics["test_loss"] < 5 and 0 < metrics["test_loss_without_condition"] < 5
    pipe = AutoregressiveImagePipeline.from_pretrained(folder / "text")
    assert pipe("a red circle").images[0].size == (16, 16)
    assert pipe.config.sampling_defaults == {"guidance_scale": 2.0}
    assert [path.name for path in (folder / "text" / "samples").iterdir()] == ["step-00000006.png"]
    assert not list(folder.rglob("*partial*"))


def test_class_training_ends_in_a_pipeline_with_class_names(stages):
    folder, _ = stages
    pipe = AutoregressiveImagePipeline.from_pretrained(folder / "class")
    assert pipe.transformer.config.id2label == {0: "circle", 1: "square"}
    training = set_up(config_of(folder, folder / "x", conditioning="class", sample_prompts=["1"]))
    assert training.sample_condition() == {"class_labels": ["1"]}  # an id only if no class is called so
    assert pipe(class_labels=["square", 0], output_type="codes").images.shape == (2, 8, 8)
    assert pipe.text_encoder is None


def test_a_fault_after_the_last_step_loses_no_weights(stages, tmp_path, monkeypatch):
    folder, _ = stages
    settings = {"conditioning": "class", "max_train_steps": 2, "eval_steps": 9, "sample_steps": 9}
    with pytest.raises(ValueError, match="no such class"):
        train_generator(config_of(folder, tmp_path / "draw", sample_prompts=["no such class"], **settings))

    def fail(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(GeneratorTask, "measure", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_generator(config_of(folder, tmp_path / "measure", **settings))
    for name in ("draw", "measure"):
        pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / name)
        assert pipe(class_labels=1).images[0].size == (16, 16)
        assert read_facts(tmp_path / name)["generator"]["metrics"] == {}


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    def save(folder):
        folder.mkdir()
        (folder / "weights").touch()
        raise RuntimeError("no room")

    (tmp_path / "index.json").touch()
    with pytest.raises(RuntimeError, match="no room"):
        replace_result(tmp_path, "index.json", save)
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


@pytest.mark.parametrize("conditioning", ["class", pytest.param("text", marks=pytest.mark.slow)])
def test_training_learns_its_condition(stages, tmp_path, conditioning):
    folder, _ = stages
    config = config_of(
        folder, tmp_path, conditioning=conditioning, max_train_steps=60, learning_rate=1e-2, dropout=0.0,
        ema_decay=0.9, hidden_size=32, intermediate_size=64, batch_size=10, checkpointing_steps=1000, eval_steps=1000,
    )  # fmt: skip
    metrics = train_generator(config)
    # Which of two shapes it is, is worth ln 2 nats an image of 64 codes.
    assert metrics["test_loss_without_condition"] - metrics["test_loss"] > 0.5 * math.log(2) / 64


@pytest.mark.parametrize("stored", [False, True])
def test_a_pretrained_text_encoder_stays_as_it_is(stages, tmp_path, stored):
    folder, _ = stages
    config = config_of(
        folder,
        tmp_path,
        text_encoder=str(folder / "encoder"),
        stored_states=stored,
        caption_templates={"{caption}": 1.0},
    )
    train_generator(config)
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path)
    for key, value in build_tiny_text_encoder().state_dict().items():
        assert torch.equal(value, pipe.text_encoder.state_dict()[key]), key
    assert pipe("a red circle").images[0].size == (16, 16)
    assert pipe.transformer.config.condition_dim == 16


def test_stored_states_train_without_a_text_encoder_at_hand(stages, tmp_path):
    folder, _ = stages
    train_generator(config_of(folder, tmp_path, stored_states=True, caption_templates={"{caption}": 1.0}))
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path)
    assert pipe.text_encoder is None
    assert pipe(prompt_embeds=torch.randn(1, 8, 16)).images[0].size == (16, 16)


def cleaning_of(folder):
    return LlamaGenConfig.from_pretrained(folder / "transformer").prompt_cleaning


def test_a_new_checkpoint_cleans_lightly_and_goes_on_as_it_was_cleaned(stages, tmp_path):
    folder, _ = stages
    assert read_codes_info(folder / "codes")["prompt_cleaning"] == "unicode"
    assert cleaning_of(folder / "text") == "unicode"
    train_generator(config_of(folder, tmp_path / "released", prompt_cleaning="released", max_train_steps=1))
    again = {"init_from": str(tmp_path / "released"), "max_train_steps": 1}
    train_generator(config_of(folder, tmp_path / "again", **again))
    assert cleaning_of(tmp_path / "released") == cleaning_of(tmp_path / "again") == "released"
    train_generator(config_of(folder, tmp_path / "other", **again, prompt_cleaning="unicode"))
    assert cleaning_of(tmp_path / "other") == "unicode"
    with pytest.raises(ValueError, match="by 'released' rules; leave prompt_cleaning"):
        set_up(config_of(folder, tmp_path / "x", **again, lora_rank=2, prompt_cleaning="unicode"))
    stored = again | {"stored_states": True, "caption_templates": {"{caption}": 1.0}}
    with pytest.raises(ValueError, match="run extract_codes with prompt_cleaning: released"):
        set_up(config_of(folder, tmp_path / "x", **stored))


def test_stored_states_say_how_their_prompts_were_cleaned(stages, tmp_path):
    folder, _ = stages
    shutil.copytree(folder / "codes", tmp_path / "codes")
    info = read_codes_info(tmp_path / "codes")
    del info["prompt_cleaning"]  # as of codes from before there was a choice
    (tmp_path / "codes" / "codes.json").write_text(json.dumps(info))
    stored = {"stored_states": True, "caption_templates": {"{caption}": 1.0}, "max_train_steps": 1}
    train_generator(generator_config(tmp_path / "out", folder / "tokenizer", tmp_path / "codes", **stored))
    assert cleaning_of(tmp_path / "out") == "released"


def test_captions_that_cleaning_leaves_nothing_of_are_bad_rows():
    rows = Dataset.from_dict({"codes": [[[0]], [[0]]], "caption": ["一只红色的狗", "a dog"]})
    samples = CodeSamples(rows, {"{caption}": 1.0}, prompt_cleaning="released")
    assert samples(rows[1], random.Random(0))["caption"] == "a dog"
    with pytest.raises(BadRow, match="nothing is left of the caption by prompt_cleaning 'released'"):
        samples(rows[0], random.Random(0))
    samples = CodeSamples(rows, {"{caption}": 1.0}, prompt_cleaning="unicode")
    assert samples(rows[0], random.Random(0))["caption"] == "一只红色的狗"


def test_training_goes_on_from_a_pipeline(stages, tmp_path):
    folder, metrics = stages
    config = config_of(
        folder, tmp_path, init_from=str(folder / "text"), max_train_steps=1, learning_rate=1e-9, lr_warmup_steps=0
    )
    config.vq_model = str(folder / "text")  # a pipeline's is as good as the tokenizer itself
    assert train_generator(config)["test_loss"] == pytest.approx(metrics["test_loss"], abs=1e-4)


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_condition_of_another_kind_takes_over_all_but_what_reads_the_condition(stages, tmp_path, kind):
    folder, _ = stages
    changes = {"conditioning": "class", "num_classes": 3} if kind == "class" else {"condition_length": 5}
    start = {"init_from": str(folder / "text"), "new_condition": True, **changes}
    config = config_of(folder, tmp_path / "out", **start, max_train_steps=2, learning_rate=1e-9, lr_warmup_steps=0)
    train_generator(replace(config, max_train_steps=1, checkpointing_steps=1))
    train_generator(config)  # goes on: what is new is the same again
    before, after = weights_of(folder / "text"), weights_of(tmp_path / "out")
    codes = len(before["model.embed_tokens.weight"])
    for name, value in after.items():
        if name.startswith(("model.text_projector.", "model.uncond_embedding.")):
            assert value.shape != before[name].shape or (value - before[name]).abs().max() > 1e-3
        else:
            torch.testing.assert_close(value[: len(before[name])], before[name], rtol=0, atol=1e-6, msg=name)
    assert len(after["model.embed_tokens.weight"]) == codes + (4 if kind == "class" else 0)
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer.config.condition_length == (1 if kind == "class" else 5)
    pipe(**({"class_labels": 2} if kind == "class" else {"prompt": "a red circle"}))


def test_the_second_stage_takes_the_weights_to_another_grid(stages, tmp_path):
    """Rotary positions have no parameters: the weights of a 8x8 grid start a training on 4x4."""
    folder, _ = stages
    data = write_shapes(tmp_path / "shapes")
    data.image_size = 8
    extract_codes(data, CodeExtractionConfig(str(folder / "tokenizer"), str(tmp_path / "codes")))
    config = config_of(
        folder, tmp_path / "out", codes_dir=str(tmp_path / "codes"), init_from=str(folder / "text"), max_train_steps=1,
        learning_rate=1e-9, lr_warmup_steps=0,
    )  # fmt: skip
    train_generator(config)
    before, after = weights_of(folder / "text"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(value, after[key], rtol=0, atol=1e-6, msg=key)
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer.config.grid_size == 4 and pipe("a cat").images[0].size == (8, 8)


def test_an_adapter_trains_alone_loads_and_merges(stages, tmp_path):
    pytest.importorskip("peft", reason="the lora extra is not installed")
    folder, _ = stages
    config = config_of(
        folder, tmp_path / "lora", init_from=str(folder / "text"), lora_rank=2, learning_rate=1e-1, lr_warmup_steps=0
    )
    metrics = train_generator(config)
    saved = {path.name for path in (tmp_path / "lora").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved and "transformer" not in saved
    assert str(folder) not in (tmp_path / "lora" / "adapter_config.json").read_text()

    pipe = AutoregressiveImagePipeline.from_pretrained(folder / "text")
    plain = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    labels, states = torch.randint(32, (1, 64)), torch.randn(1, 8, 16)
    before = pipe.transformer(labels[:, :-1], prompt_embeds=states).logits
    pipe.load_lora_weights(tmp_path / "lora")
    adapted = pipe.transformer(labels[:, :-1], prompt_embeds=states).logits
    assert (adapted - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="call fuse_lora"):
        pipe.save_pretrained(tmp_path / "never")
    pipe.unload_lora_weights()
    assert torch.equal(pipe.transformer(labels[:, :-1], prompt_embeds=states).logits, before)
    with pytest.raises(ValueError, match="There is no adapter"):
        pipe.fuse_lora()

    pipe.load_lora_weights(tmp_path / "lora")
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    fused = AutoregressiveImagePipeline.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(fused.transformer(labels[:, :-1], prompt_embeds=states).logits, adapted)
    changed = [key for key, value in plain.items() if not torch.equal(value, fused.transformer.state_dict()[key])]
    assert changed and all("_proj.weight" in key for key in changed)

    training = set_up(config_of(folder, tmp_path / "eval", init_from=str(tmp_path / "fused")))
    samples = training.samples(training.test, training=False)
    loss, _ = mean_loss(
        ConditionToCodes(fused.transformer, fused.text_encoder),
        batches_once(training.test, samples, training.collate, 8),
    )
    assert loss == pytest.approx(metrics["test_loss"], abs=1e-4)


def test_an_adapter_that_does_not_fit_is_refused(stages, tmp_path):
    pytest.importorskip("peft", reason="the lora extra is not installed")
    folder, _ = stages
    pipe = AutoregressiveImagePipeline.from_pretrained(folder / "text")
    with pytest.raises(ValueError, match="is not an adapter: it has no adapter_config.json"):
        pipe.load_lora_weights(tmp_path)
    train_generator(
        config_of(folder, tmp_path / "lora", init_from=str(folder / "text"), lora_rank=2, max_train_steps=1)
    )
    other = AutoregressiveImagePipeline(pipe.vq_model, build_transformer(vocab_size=32))
    with pytest.raises(ValueError, match="does not fit this model"):
        other.load_lora_weights(tmp_path / "lora")
    with pytest.raises(ValueError, match="set init_from"):
        config_of(folder, tmp_path, lora_rank=2)


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_the_loss_is_that_of_the_codes_after_their_condition(conditioning):
    model = build_transformer(conditioning=conditioning)
    wrapped = ConditionToCodes(model, build_tiny_text_encoder() if conditioning == "text" else None).eval()
    codes = torch.randint(64, (2, 16))
    if conditioning == "class":
        labels = torch.tensor([1, 7])
        logits = model(torch.cat([64 + labels[:, None], codes[:, :-1]], 1)).logits
        inputs = {"class_labels": labels}
    else:
        states = torch.randn(2, 12, 16)
        logits = model(codes[:, :-1], prompt_embeds=states).logits
        inputs = {"prompt_embeds": states, "prompt_attention_mask": torch.ones(2, 12, dtype=torch.long)}
    expected = -logits.log_softmax(-1).gather(-1, codes[..., None]).mean()
    torch.testing.assert_close(wrapped(codes, **inputs), expected)
    null = wrapped(codes, **inputs, without_condition=True)
    others = {name: value.flip(0) for name, value in inputs.items()}
    torch.testing.assert_close(null, wrapped(codes, **others, without_condition=True))
    assert abs(null - expected) > 1e-3


def test_every_parameter_is_in_one_group_with_its_rate_and_decay():
    model = ConditionToCodes(build_transformer(conditioning="text"), build_tiny_text_encoder())
    groups = parameter_groups(model, learning_rate=1e-3, text_learning_rate=1e-4, weight_decay=0.05)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_text = "text_encoder" in name or "text_projector" in name or "uncond_embedding" in name
        assert found[id(parameter)]["lr"] == (1e-4 if is_text else 1e-3), name
        assert found[id(parameter)]["weight_decay"] == (0.05 if parameter.ndim >= 2 else 0.0), name


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = build_transformer(num_hidden_layers=3, grid_size=8)
    ids = torch.cat([torch.tensor([[64]]), torch.randint(64, (1, 63))], 1)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loss = model(ids, labels=torch.randint(64, (1, 64)), use_cache=False).loss
        loss.backward()
    assert flops_per_image(model) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_text_encoder_learns_what_its_captions_look_like(stages):
    folder, _ = stages
    pipe = AutoregressiveImagePipeline.from_pretrained(folder / "text")
    rows = load_codes(folder / "codes", "train", read_codes_info(folder / "codes")["vq_model_fingerprint"])
    training = set_up(config_of(folder, folder / "never", batch_size=20))
    samples = CodeSamples(rows, {"{caption}": 1.0}, training=False)
    batches = list(batches_once(rows, samples, training.collate, 20)) * 150
    assert isinstance(training.collate, CodeCollator)
    encoder = build_text_encoder(training.tokenizer, width=16, layers=1, heads=2)
    encoder.config.dropout_rate = 0.0
    vectors = partial(codebook_vectors, pipe.vq_model)
    before = pretrain_text_encoder(encoder, batches, vectors, steps=1, learning_rate=0.0)
    after = pretrain_text_encoder(encoder, batches, vectors, steps=150, learning_rate=1e-2)
    assert before < 0 and after > 0.1


def test_rotary_and_dropout_of_init_from_stay_unless_the_recipe_says_otherwise(stages, tmp_path):
    folder, _ = stages
    start = {"init_from": str(folder / "text"), "max_train_steps": 1}
    assert set_up(config_of(folder, tmp_path / "new")).transformer.config.condition_rotary == "identity"
    same = set_up(config_of(folder, tmp_path / "same", **start)).transformer.config
    assert same.condition_rotary == "identity" and same.ffn_dropout == 0.1
    train_generator(config_of(folder, tmp_path / "out", **start, condition_rotary="zero", dropout=0.0))
    saved = AutoregressiveImagePipeline.from_pretrained(tmp_path / "out").transformer.config
    assert saved.condition_rotary == "zero" and saved.embedding_dropout == saved.residual_dropout == 0.0
    with pytest.raises(ValueError, match="with condition_rotary 'identity'; leave condition_rotary"):
        train_generator(config_of(folder, tmp_path / "lora", **start, lora_rank=2, condition_rotary="zero"))


def test_the_whole_step_or_its_layers_are_compiled(stages, tmp_path, monkeypatch):
    folder, _ = stages
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compiled.append(model.__name__) or model)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: compiled.append(type(self).__name__))
    train_generator(config_of(folder, tmp_path / "whole", compile=True, max_train_steps=1))
    train_generator(config_of(folder, tmp_path / "off", max_train_steps=1))
    assert compiled == ["_loss"]
    config = config_of(folder, tmp_path / "layers", compile=True, gradient_checkpointing=True, max_train_steps=1)
    train_generator(config)
    assert compiled == ["_loss", "LlamaGenDecoderLayer"]
    assert weights_of(tmp_path / "layers").keys() == weights_of(folder / "text").keys()


def test_long_trainings_are_compiled_where_there_is_a_compiler(stages, tmp_path, monkeypatch):
    folder, _ = stages
    for missing, steps, expected in ((None, 1000, True), (None, 999, False), ("a C++ compiler", 1000, False)):
        monkeypatch.setattr("llamagen_hf.training.hardware.missing_for_cpu", lambda found=missing: found)
        trainer = set_up(config_of(folder, tmp_path / f"{steps}{expected}", max_train_steps=steps)).trainer
        assert trainer.compiles == expected


@pytest.mark.slow
def test_a_compiled_training_has_the_same_losses_and_resumes_exactly(stages, tmp_path):
    folder, _ = stages
    settings = {
        "conditioning": "class",
        "dropout": 0.0,
        "condition_dropout": 0.0,
    }  # both draw random numbers
    config = config_of(folder, tmp_path / "plain", **settings, max_train_steps=6, log_steps=1)
    compiled = replace(config, output_dir=str(tmp_path / "compiled"), compile=True)
    train_generator(config)
    train_generator(compiled)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("plain", "compiled")]
    losses = [[json.loads(line).get("loss", 0.0) for line in log] for log in logs]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)
    resumed = replace(compiled, output_dir=str(tmp_path / "resumed"))
    train_generator(replace(resumed, max_train_steps=3, checkpointing_steps=3))
    train_generator(resumed)
    assert weights_of(tmp_path / "resumed").keys() == weights_of(tmp_path / "compiled").keys()
    for name, value in weights_of(tmp_path / "resumed").items():
        assert torch.equal(value, weights_of(tmp_path / "compiled")[name]), name


def test_recipes_that_do_not_fit_are_one_sentence(stages, tmp_path):
    folder, _ = stages
    for message, kwargs in {
        "is text-conditional, but conditioning is 'class'": {
            "init_from": str(folder / "text"),
            "conditioning": "class",
        },
        "new_condition trains all weights of a pipeline: set init_from": {"new_condition": True},
        "variant is 'Z'; expected 'B', 'L'": {"variant": "Z"},
        "20 rows do not fill one batch of 21": {"batch_size": 21},
        "codes have no column 'kind'": {"conditioning": "class", "label_column": "kind"},
        "does not say how many classes": {"conditioning": "class", "label_column": "index"},
        "There are no codes at": {"codes_dir": str(tmp_path)},
    }.items():
        with pytest.raises(ValueError, match=message):
            train_generator(config_of(folder, tmp_path / "out", **kwargs))
    copy = tmp_path / "other"
    shutil.copytree(folder / "tokenizer", copy, ignore=shutil.ignore_patterns("checkpoints", "samples"))
    data = write_shapes(tmp_path / "shapes")
    train_tokenizer(
        data, tokenizer_config(copy, init_from=str(folder / "tokenizer"), max_train_steps=1, lr_warmup_steps=0)
    )
    with pytest.raises(ValueError, match="come from another tokenizer"):
        train_generator(generator_config(tmp_path / "out", copy, folder / "codes"))


def test_initial_predictions_are_uniform(stages, tmp_path):
    folder, _ = stages
    training = set_up(config_of(folder, tmp_path))
    assert isinstance(training.transformer, LlamaGenForConditionalGeneration)
    assert training.measure()["test_loss"] == pytest.approx(torch.tensor(32.0).log().item(), abs=1e-5)


@pytest.fixture(scope="module")
def with_clip(stages):
    """A CLIP, codes with its embeddings, and a generator that reads them."""
    folder, _ = stages
    for part in build_clip():
        part.save_pretrained(folder / "clip")
    data = DataConfig(str(folder / "shapes"), image_size=16)
    extract_codes(
        data, CodeExtractionConfig(str(folder / "tokenizer"), str(folder / "image_codes"), clip=str(folder / "clip"))
    )
    metrics = train_generator(of_images(folder, folder / "of_images"))
    return folder, metrics


def of_images(folder, output_dir, **kwargs):
    settings = {"stored_states": True, "caption_templates": {"{image}": 1.0}, "condition_length": 1} | kwargs
    return generator_config(output_dir, folder / "tokenizer", folder / "image_codes", **settings)


def test_a_generator_draws_from_the_embedding_of_an_image(with_clip):
    folder, metrics = with_clip
    assert metrics.keys() == {"test_loss", "test_loss_without_condition"}
    info = read_codes_info(folder / "image_codes")
    assert info["image_dim"] == 12 and info["clip"] == str(folder / "clip") and "text_dim" not in info
    rows = load_codes(folder / "image_codes", "test", info["vq_model_fingerprint"])
    stored = torch.stack([decode_states(row["image_states"], 12) for row in rows])
    embeddings = embed_images(*load_clip(folder / "clip"), [draw_shape(i) for i in range(len(rows))])
    torch.testing.assert_close(stored.float(), embeddings[:, None], atol=1e-3, rtol=0)
    pipe = AutoregressiveImagePipeline.from_pretrained(folder / "of_images")
    config = pipe.transformer.config
    assert (config.condition_length, config.condition_dim, pipe.text_encoder) == (1, 12, None)
    assert len(pipe(prompt_embeds=embeddings[:2, None]).images) == 2
    with pytest.raises(ValueError, match=r"`prompt_embeds` has shape \(1, 1, 8\); expected \(batch, 1, 12\)"):
        pipe(prompt_embeds=torch.zeros(1, 1, 8))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"condition_length": 8}, "condition_length is 8; the embedding of an image is one position, so set it to 1"),
        ({"caption_templates": {"{image}": 1.0, "{caption}": 1.0}}, "'{image}' is the only caption template"),
        ({"caption_templates": {"{caption}": 1.0}}, "The codes have no text states; run extract_codes with text_enc"),
        ({"init_from": "text"}, "The stored states are 12 wide, but the generator reads 16"),
    ],
)
def test_embeddings_that_do_not_fit_a_generator(with_clip, tmp_path, settings, message):
    folder, _ = with_clip
    if "init_from" in settings:
        settings = {"init_from": str(folder / settings["init_from"])}
    with pytest.raises(ValueError, match=message):
        train_generator(of_images(folder, tmp_path / "x", **settings))


def test_the_text_encoder_of_a_clip_encodes_prompts(with_clip, tmp_path):
    folder, _ = with_clip
    train_generator(config_of(folder, tmp_path, text_encoder=str(folder / "clip"), max_train_steps=1))
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path)
    assert type(pipe.text_encoder) is CLIPTextModel and pipe.transformer.config.condition_dim == 16
    whole, _ = load_clip(folder / "clip")
    assert pipe("w1 w2").images[0].size == (16, 16)
    states, mask = pipe.encode_prompt("w1 w2")
    ids = pipe.tokenizer("w1 w2", return_tensors="pt").input_ids
    expected = whole.text_model(ids).last_hidden_state[0]
    torch.testing.assert_close(states[0, -len(expected) :], expected)  # padding is on the left
    assert mask.sum() == len(expected)
