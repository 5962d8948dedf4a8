"""The three stages on pictures drawn here, as functions and as the commands of the README."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tiny import build_text_encoder as build_tiny_text_encoder
from tiny import build_transformer


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenVQModel  # noqa: E402
from llamagen_hf.data.captions import write_caption  # noqa: E402
from llamagen_hf.data.codes import CodeDataset, code_loader, load_codes  # noqa: E402
from llamagen_hf.data.extraction import CodeExtractionConfig, extract_codes  # noqa: E402
from llamagen_hf.data.images import DataConfig, center_crop, random_crop, to_tensor  # noqa: E402
from llamagen_hf.prompts import tokenize_prompts  # noqa: E402
from llamagen_hf.training.checkpoints import resume  # noqa: E402
from llamagen_hf.training.generator import (  # noqa: E402
    GeneratorTrainingConfig,
    TextToCodes,
    parameter_groups,
    train_generator,
)
from llamagen_hf.training.recipe import parse_recipe  # noqa: E402
from llamagen_hf.training.text_encoder import build_text_encoder, pretrain_text_encoder  # noqa: E402
from llamagen_hf.training.tokenizer import (  # noqa: E402
    TokenizerTrainingConfig,
    reconstruction_loss,
    revive_codes,
    train_tokenizer,
)


ROOT = Path(__file__).parents[1]
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Coloured circles and squares on white, 20 to train on and 8 to test on."""
    folder = tmp_path_factory.mktemp("shapes")
    for split, count in (("train", 20), ("test", 8)):
        rows = {"image": [], "caption": [], "shape": [], "tags": []}
        for i in range(count):
            name, color = list(COLORS.items())[i % 4]
            shape = ("circle", "square")[i % 2]
            image = Image.new("RGB", (20, 16), "white")
            draw = ImageDraw.Draw(image)
            getattr(draw, "ellipse" if shape == "circle" else "rectangle")((4 + i % 3, 3, 14, 13), fill=color)
            rows["image"].append(image)
            rows["caption"].append(f"a {name} {shape}")
            rows["shape"].append(i % 2)
            rows["tags"].append([name, shape])
        features = datasets.Features(
            image=datasets.Image(),
            caption=datasets.Value("string"),
            shape=datasets.ClassLabel(names=["circle", "square"]),
            tags=datasets.List(datasets.Value("string")),
        )
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000.parquet")
    return DataConfig(dataset=str(folder), image_size=16)


def tokenizer_config(folder, **kwargs):
    return TokenizerTrainingConfig(
        output_dir=str(folder),
        **{
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "latent_channels": 8,
            "norm_num_groups": 4,
            "vq_embed_dim": 4,
            "num_vq_embeddings": 32,
            "max_train_steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 2,
            "gradient_weight": 1.0,
            "revive_until_step": 6,
            "revive_every": 2,
            "checkpointing_steps": 3,
            "log_steps": 2,
        }
        | kwargs,
    )


def generator_config(folder, tokenizer, codes, **kwargs):
    return GeneratorTrainingConfig(
        codes_dir=str(codes),
        tokenizer=str(tokenizer),
        output_dir=str(folder),
        **{
            "caption_templates": {"{caption}": 1.0, "{tags}": 1.0, "{shape}": 0.5},
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "condition_length": 8,
            "text_vocab_size": 270,
            "text_width": 16,
            "text_layers": 1,
            "text_heads": 2,
            "max_train_steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "lr_warmup_steps": 2,
            "checkpointing_steps": 3,
            "log_steps": 2,
            "eval_steps": 3,
            "sampling_defaults": {"guidance_scale": 2.0},
        }
        | kwargs,
    )


@pytest.fixture(scope="module")
def stages(dataset, tmp_path_factory):
    """One run of all three stages."""
    folder = tmp_path_factory.mktemp("run")
    metrics = {"tokenizer": train_tokenizer(dataset, tokenizer_config(folder / "tokenizer"))}
    extraction = CodeExtractionConfig(str(folder / "tokenizer"), str(folder / "codes"), num_crops=2, batch_size=8)
    metrics["codes"] = extract_codes(dataset, extraction)
    metrics["generator"] = train_generator(
        generator_config(folder / "pipeline", folder / "tokenizer", folder / "codes")
    )
    return folder, metrics


def weights_of(folder):
    from safetensors.torch import load_file

    return {str(p.relative_to(folder)): load_file(p) for p in sorted(Path(folder).glob("**/*.safetensors"))
            if "checkpoints" not in p.parts}  # fmt: skip


def assert_same_weights(one, other):
    one, other = weights_of(one), weights_of(other)
    assert one and one.keys() == other.keys()
    for file in one:
        for key, value in one[file].items():
            assert torch.equal(value, other[file][key]), (file, key)


def test_stages_end_in_a_pipeline_that_draws(stages):
    folder, metrics = stages
    assert metrics["codes"] == {"train": 20, "test": 8}
    assert metrics["tokenizer"]["psnr"] > 0 and 0 < metrics["tokenizer"]["codebook_usage"] <= 1
    assert 0 < metrics["generator"]["test_loss"] < 5
    pipe = AutoregressiveImagePipeline.from_pretrained(folder / "pipeline")
    assert pipe("a red circle").images[0].size == (16, 16)
    assert pipe.config.sampling_defaults == {"guidance_scale": 2.0}
    assert not [p for p in folder.rglob("*partial*")]


def test_resumed_tokenizer_equals_the_uninterrupted_one(dataset, stages, tmp_path):
    folder, _ = stages
    config = tokenizer_config(tmp_path)
    shutil.copytree(folder / "tokenizer" / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")  # stopped after step 3, in the middle of an epoch
    (tmp_path / "checkpoints" / "partial-00000005").mkdir()  # and while it was writing
    train_tokenizer(dataset, config)
    assert_same_weights(tmp_path, folder / "tokenizer")


def test_resumed_generator_equals_the_uninterrupted_one(stages, tmp_path):
    folder, _ = stages
    shutil.copytree(folder / "pipeline" / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    train_generator(generator_config(tmp_path, folder / "tokenizer", folder / "codes"))
    assert_same_weights(tmp_path / "transformer", folder / "pipeline" / "transformer")
    assert_same_weights(tmp_path / "text_encoder", folder / "pipeline" / "text_encoder")


def test_a_finished_run_trains_no_further(dataset, stages, tmp_path):
    folder, metrics = stages
    shutil.copytree(folder / "tokenizer", tmp_path, dirs_exist_ok=True)
    assert train_tokenizer(dataset, tokenizer_config(tmp_path)) == metrics["tokenizer"]
    assert_same_weights(tmp_path, folder / "tokenizer")


def test_decoder_only_training_keeps_every_code(dataset, stages, tmp_path):
    folder, _ = stages
    config = tokenizer_config(tmp_path, init_from=str(folder / "tokenizer"), decoder_only=True)
    train_tokenizer(dataset, config)
    before = LlamaGenVQModel.from_pretrained(folder / "tokenizer")
    after = LlamaGenVQModel.from_pretrained(tmp_path)
    for key, value in before.state_dict().items():
        same = torch.equal(value, after.state_dict()[key])
        if key.startswith(("encoder", "quant")):
            assert same, key
        elif key.endswith("conv.weight"):
            assert not same, key


def test_codes_are_those_of_the_tokenizer(dataset, stages):
    folder, _ = stages
    model = LlamaGenVQModel.from_pretrained(folder / "tokenizer").eval()
    rows = datasets.load_dataset("parquet", data_files=str(folder / "codes" / "test.parquet"), split="train")
    assert rows.column_names == ["caption", "tags", "shape", "codes", "tokenizer"]
    assert rows[1]["shape"] == "square" and len(rows[0]["codes"]) == 2 and len(rows[0]["codes"][0]) == 64
    image = dataset.load("test")[3]["image"]
    codes = model.encode(to_tensor(center_crop(image, 16))[None]).codes.flatten().tolist()
    assert rows[3]["codes"][0] == codes


def test_a_text_encoder_learns_what_its_captions_look_like(stages):
    folder, _ = stages
    pipe = AutoregressiveImagePipeline.from_pretrained(folder / "pipeline")
    rows = datasets.load_dataset("parquet", data_files=str(folder / "codes" / "train.parquet"), split="train")
    dataset = CodeDataset(rows, {"{caption}": 1.0}, training=False)
    loader = code_loader(dataset, partial(tokenize_prompts, pipe.tokenizer, length=8), batch_size=20)
    encoder = build_text_encoder(pipe.tokenizer, width=16, layers=1, heads=2)
    encoder.config.dropout_rate = 0.0
    before = pretrain_text_encoder(encoder, loader, pipe.vq_model, steps=1, learning_rate=0.0)
    after = pretrain_text_encoder(encoder, loader, pipe.vq_model, steps=150, learning_rate=1e-2)
    assert before < 0 and after > 0.1


def test_every_parameter_is_in_one_group_with_its_rate_and_decay():
    config = generator_config("", "", "", learning_rate=1e-3, text_learning_rate=1e-4, weight_decay=0.05)
    model = TextToCodes(build_transformer(conditioning="text"), build_tiny_text_encoder())
    groups = parameter_groups(model, config)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_text = "text_encoder" in name or "text_projector" in name or "uncond_embedding" in name
        assert found[id(parameter)]["lr"] == (1e-4 if is_text else 1e-3), name
        assert found[id(parameter)]["weight_decay"] == (0.05 if parameter.ndim >= 2 else 0.0), name


def test_training_goes_on_from_a_pipeline(stages, tmp_path):
    folder, metrics = stages
    config = generator_config(
        tmp_path, folder / "tokenizer", folder / "codes", init_from=str(folder / "pipeline"), max_train_steps=1,
        learning_rate=1e-9, lr_warmup_steps=0,
    )  # fmt: skip
    assert train_generator(config)["test_loss"] == pytest.approx(metrics["generator"]["test_loss"], abs=1e-4)


def test_codes_of_another_tokenizer_are_refused(stages):
    folder, _ = stages
    with pytest.raises(ValueError, match="come from another tokenizer"):
        load_codes(str(folder / "codes"), "train", "0123456789abcdef")
    with pytest.raises(ValueError, match="run extract_codes first"):
        load_codes(str(folder / "absent"), "train", "")


def test_captions_follow_the_templates():
    row, rng = {"caption": "a red circle", "tags": ["red", "circle"], "none": []}, random.Random(0)
    assert write_caption(row, {"{caption}": 1.0}, rng) == "a red circle"
    drawn = {write_caption(row, {"{tags} icon": 1.0}, rng) for _ in range(200)}
    assert drawn == {"red icon", "circle icon", "red circle icon", "circle red icon"}
    assert write_caption(row, {"{none}": 1.0, "{caption}": 0.1}, rng) == "a red circle"
    with pytest.raises(ValueError, match="names 'title'; the columns are .'caption', 'none', 'tags'."):
        write_caption(row, {"{title}": 1.0}, rng)


@pytest.mark.parametrize("size", [(64, 64), (65, 130), (33, 47), (300, 129)])
def test_crops_have_the_size_asked_for(size):
    image = Image.new("RGB", size, "red")
    assert center_crop(image, 32).size == (32, 32)
    assert random_crop(image, 32, 1.1).size == (32, 32)


def test_pixels_lie_in_minus_one_to_one():
    image = Image.new("RGBA", (2, 1), (255, 0, 128, 255))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 1, 2)
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, -1.0, 128 / 127.5 - 1]))


def test_reconstruction_loss_by_its_definition():
    config = TokenizerTrainingConfig(output_dir="", l1_weight=2.0, l2_weight=3.0, gradient_weight=0.5)
    images = torch.zeros(1, 1, 2, 2)
    sample = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    # One pixel of four is off by 1: two neighbour differences of two each are off by 1 on each axis' mean.
    expected = 2 * 0.25 + 3 * 0.25 + 0.5 * (0.5 + 0.5)
    torch.testing.assert_close(reconstruction_loss(sample, images, config), torch.tensor(expected))


def test_revived_codes_are_used_at_once():
    torch.manual_seed(0)
    model = LlamaGenVQModel(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=8, num_vq_embeddings=256, norm_num_groups=4
    )
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    counts = model.encode(images).codes.flatten().bincount(minlength=256)
    dead = (counts == 0).nonzero().flatten()
    moved = revive_codes(model, counts, images)
    assert moved == len(dead) > 0
    now = model.encode(images).codes.flatten().bincount(minlength=256)
    assert (now[dead] > 0).float().mean() > 0.9


def test_resume_of_an_empty_folder_starts_at_zero(tmp_path):
    assert resume(None, tmp_path) == 0


@pytest.mark.parametrize(
    "recipe, flags, message",
    [
        ("tokenizer: {batch_sice: 3}", [], "has no key 'batch_sice'. Did you mean 'batch_size'?"),
        ("tokenizer: [", [], "cannot read the recipe"),
        ("tokenizer: {}", [], "--output_dir"),
        ("", [], "has no sections"),
        ("tokeniser: {output_dir: out}", [], "has no section 'tokenizer'; it has tokeniser"),
        ("tokenizer: {output_dir: out}", ["--bach_size", "3"], "there is no option --bach_size"),
        ("tokenizer: {output_dir: out}", ["--batch_size", "many"], "invalid int value: 'many'"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, capsys, recipe, flags, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(SystemExit):
        parse_recipe("", ("tokenizer", TokenizerTrainingConfig), args=["--config", str(path), *flags])
    assert message in capsys.readouterr().err


def test_flags_override_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("tokenizer: {output_dir: out, batch_size: 3, learning_rate: 1.0e-3}")
    (config,) = parse_recipe(
        "", ("tokenizer", TokenizerTrainingConfig), args=["--config", str(path), "--batch_size", "5"]
    )
    assert replace(config, batch_size=3) == TokenizerTrainingConfig("out", batch_size=3, learning_rate=1e-3)
    assert config.batch_size == 5


def test_dict_fields_are_json_on_the_command_line():
    flags = ["--codes_dir", "c", "--tokenizer", "t", "--output_dir", "o", "--sampling_defaults", '{"top_k": 5}']
    (config,) = parse_recipe("", ("generator", GeneratorTrainingConfig), args=flags)
    assert config.sampling_defaults == {"top_k": 5}


def test_too_few_pictures_for_a_batch_is_one_sentence(dataset, stages, tmp_path):
    folder, _ = stages
    with pytest.raises(ValueError, match="20 pictures do not fill one batch of 21"):
        train_tokenizer(dataset, tokenizer_config(tmp_path, batch_size=21))
    with pytest.raises(ValueError, match="20 pictures do not fill one batch of 21"):
        train_generator(generator_config(tmp_path, folder / "tokenizer", folder / "codes", batch_size=21))


def test_the_emoji_recipe_is_whole():
    recipe = ["--config", str(ROOT / "pipelines" / "recipes" / "emoji.yaml")]
    data, tokenizer = parse_recipe("", ("data", DataConfig), ("tokenizer", TokenizerTrainingConfig), args=recipe)
    (generator,) = parse_recipe("", ("generator", GeneratorTrainingConfig), args=recipe)
    (codes,) = parse_recipe("", ("codes", CodeExtractionConfig), args=recipe)
    assert data.image_size == 64 and tokenizer.output_dir == codes.tokenizer == generator.tokenizer
    assert codes.output_dir == generator.codes_dir


def test_a_missing_folder_or_column_is_one_sentence(dataset):
    with pytest.raises(ValueError, match="There is no folder './absent'"):
        DataConfig(dataset="./absent").load("train")
    with pytest.raises(ValueError, match="has no column 'picture'; it has"):
        replace(dataset, image_column="picture").load("train")


@pytest.mark.slow
def test_the_commands_of_the_stages(dataset, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "data": {"dataset": dataset.dataset, "image_size": 16},
        "tokenizer": vars(tokenizer_config(tmp_path / "tokenizer")),
        "codes": {"tokenizer": str(tmp_path / "tokenizer"), "output_dir": str(tmp_path / "codes")},
        "generator": vars(generator_config(tmp_path / "pipeline", tmp_path / "tokenizer", tmp_path / "codes")),
    }
    recipe.write_text(json.dumps(sections))  # JSON is YAML
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    for stage in ("train_tokenizer", "extract_codes", "train_generator"):
        result = subprocess.run(
            [*launch, ROOT / "pipelines" / f"{stage}.py", "--config", recipe],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("a blue square").images[0].size == (16, 16)
