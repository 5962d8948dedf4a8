"""Recipes: sections, overrides, and what is said of mistakes before anything is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.arguments import FieldError  # noqa: E402
from llamagen_hf.data.filtering import FilterConfig  # noqa: E402
from llamagen_hf.data.recaptioning import RecaptionConfig  # noqa: E402
from llamagen_hf.data.scoring import ScoreConfig  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.diffusion.training.classifier_config import ClassifierTrainingConfig  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_config import DiffusionTrainingConfig  # noqa: E402
from llamagen_hf.llamagen.conversion import VARIANTS  # noqa: E402
from llamagen_hf.llamagen.training.extraction import CodeExtractionConfig  # noqa: E402
from llamagen_hf.llamagen.training.generator_config import GeneratorTrainingConfig  # noqa: E402
from llamagen_hf.llamagen.training.vq_config import TokenizerTrainingConfig  # noqa: E402
from llamagen_hf.training.recipe import parse_recipe, read_recipe  # noqa: E402
from llamagen_hf.unclip.training.clip_config import CLIPTrainingConfig  # noqa: E402
from llamagen_hf.unclip.training.prior_config import PriorTrainingConfig  # noqa: E402


RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
SECTIONS = {
    "data": DataConfig,
    "vq_model": TokenizerTrainingConfig,
    "codes": CodeExtractionConfig,
    "generator": GeneratorTrainingConfig,
    "diffusion": DiffusionTrainingConfig,
    "prior": PriorTrainingConfig,
    "classifier": ClassifierTrainingConfig,
    "clip": CLIPTrainingConfig,
    "filter": FilterConfig,
    "score": ScoreConfig,
    "recaption": RecaptionConfig,
}


@pytest.mark.parametrize(
    "recipe, flags, message",
    [
        ("vq_model: {batch_sice: 3}", [], "has no key 'batch_sice'. Did you mean 'batch_size'?"),
        ("vq_model: [", [], "cannot read the recipe"),
        ("vq_model: {}", [], "--output_dir"),
        ("", [], "has no sections"),
        ("tokeniser: {output_dir: out}", [], "has no section 'vq_model'; it has tokeniser"),
        ("vq_model: {output_dir: out}", ["--bach_size", "3"], "there is no option --bach_size"),
        ("vq_model: {output_dir: out}", ["--batch_size", "many"], "invalid int value: 'many'"),
        ("vq_model: {output_dir: out, batch_size: many}", [], "has batch_size: 'many'; it must be int"),
        ("vq_model: {output_dir: out, batch_size: 3.5}", [], "has batch_size: 3.5; it must be int"),
        ("vq_model: {output_dir: out, decoder_only: 1}", [], "has decoder_only: 1; it must be bool"),
        ("vq_model: {output_dir: out, learning_rate: fast}", [], "has learning_rate: 'fast'; it must be float"),
        (
            "vq_model: {output_dir: out, block_out_channels: [8, x]}",
            [],
            "block_out_channels: [8, 'x']; it must be a list of int",
        ),
        ("vq_model: {output_dir: out, batch_size: 0}", [], "batch_size is 0; it must be at least 1"),
        (
            "vq_model: {output_dir: out, discriminator: gan}",
            [],
            "discriminator: 'gan'; it must be 'patchgan' or 'stylegan' or null",
        ),
        ("vq_model: {output_dir: out, mixed_precision: no}", [], "mixed_precision: False; it must be 'no', 'bf16' or"),
        ("vq_model: {output_dir: out}", ["--crop", "corner"], "invalid choice: 'corner' (choose from"),
        ("base: 3\nvq_model: {output_dir: out}", [], "has base: 3; it must be the path of another recipe"),
    ],
)
def test_wrong_recipes_are_refused(tmp_path, capsys, recipe, flags, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(SystemExit):
        parse_recipe("", ("vq_model", TokenizerTrainingConfig), args=["--config", str(path), *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("vq_model: {output_dir: Bücher}".encode("cp1252"), "it is not UTF-8; save it as UTF-8"),
        ("vq_model: {output_dir: out}".encode("utf-16"), "it is not UTF-8; save it as UTF-8"),
        (None, "Is a directory"),
        (b"", "has no sections"),
        (b"- vq_model", "has no sections"),
        (b"vq_model", "has no sections"),
        (b"vq_model: {output_dir: a\0b}", "cannot read the recipe"),
        (b"vq_model: {output_dir: 2026-13-45}", "cannot read the recipe"),
        (b"vq_model: {}\n---\nvq_model: {}", "cannot read the recipe"),
        (b"vq_model: {1: 2}", "has no key 1"),
        (b"vq_model:", "has no section 'vq_model'"),
    ],
)
def test_files_that_are_not_recipes_are_one_sentence(tmp_path, capsys, content, message):
    path = tmp_path / "recipe.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit):
        parse_recipe("", ("vq_model", TokenizerTrainingConfig), args=["--config", str(path)])
    error = capsys.readouterr().err
    assert message in error and error.startswith("Error: ") and error.count("\n") == 1


def test_a_recipe_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("vq_model: {output_dir: Bücher}", encoding="utf-8-sig")
    (config,) = parse_recipe("", ("vq_model", TokenizerTrainingConfig), args=["--config", str(path)])
    assert config.output_dir == "Bücher"


def test_flags_override_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("vq_model: {output_dir: out, batch_size: 3, learning_rate: 1e-3, discriminator: null}")
    (config,) = parse_recipe(
        "", ("vq_model", TokenizerTrainingConfig), args=["--config", str(path), "--batch_size", "5"]
    )
    expected = TokenizerTrainingConfig("out", batch_size=3, learning_rate=1e-3, discriminator=None)
    assert replace(config, batch_size=3) == expected
    assert config.batch_size == 5


def parse_vq_model(path: Path, *flags: str) -> TokenizerTrainingConfig:
    return parse_recipe("", ("vq_model", TokenizerTrainingConfig), args=["--config", str(path), *flags])[0]


def test_a_recipe_adds_its_sections_to_those_of_its_base(tmp_path):
    (tmp_path / "sizes").mkdir()
    (tmp_path / "base.yaml").write_text(
        "data: {dataset: images}\ntokenizer: {output_dir: base, batch_size: 3, seed: 1}"
    )
    (tmp_path / "sizes" / "small.yaml").write_text("base: ../base.yaml\nvq_model: {output_dir: small}")
    (tmp_path / "last.yaml").write_text("base: sizes/small.yaml\nvq_model: {seed: 2, block_out_channels: [8]}")
    config = parse_vq_model(tmp_path / "last.yaml", "--learning_rate", "1e-3")
    assert config == TokenizerTrainingConfig("small", batch_size=3, seed=2, block_out_channels=[8], learning_rate=1e-3)
    assert read_recipe(tmp_path / "last.yaml")["data"] == {"dataset": "images"}


@pytest.mark.parametrize(
    "base, message",
    [
        ("absent.yaml", "cannot read the recipe {folder}/absent.yaml, the base of {folder}/recipe.yaml: No such file"),
        ("recipe.yaml", "the recipe {folder}/recipe.yaml is its own base"),
        ("other.yaml", "is its own base: {folder}/recipe.yaml -> {folder}/other.yaml -> {folder}/recipe.yaml"),
        ("list.yaml", "the recipe {folder}/list.yaml, the base of {folder}/recipe.yaml has no sections"),
    ],
)
def test_wrong_bases_are_one_sentence(tmp_path, capsys, base, message):
    (tmp_path / "recipe.yaml").write_text(f"base: {base}\nvq_model: {{output_dir: out}}")
    (tmp_path / "other.yaml").write_text("base: recipe.yaml")
    (tmp_path / "list.yaml").write_text("[vq_model]")
    with pytest.raises(SystemExit):
        parse_vq_model(tmp_path / "recipe.yaml")
    error = capsys.readouterr().err
    assert message.format(folder=tmp_path) in error and error.count("\n") == 1


def test_keys_and_sections_of_earlier_versions_load(tmp_path):
    """The image tokenizer was called `tokenizer`; a recipe may have the new name and its base the old one."""
    path = tmp_path / "old.yaml"
    path.write_text(
        "data: {dataset: a}\ntokenizer: {output_dir: out}\ncodes: {tokenizer: t, output_dir: c}\n"
        "generator: {tokenizer: t, codes_dir: c, output_dir: g}"
    )
    (tmp_path / "new.yaml").write_text("base: old.yaml\ngenerator: {vq_model: u}")
    assert parse_vq_model(path).output_dir == "out"
    codes = ("codes", CodeExtractionConfig)
    generator = ("generator", GeneratorTrainingConfig)
    for flags, found in (
        ([], "t"),
        (["--tokenizer", "u"], "u"),
        (["--vq_model", "u"], "u"),
        (["--vq-model", "u"], "u"),
    ):
        for section in (codes, generator):
            (config,) = parse_recipe("", section, args=["--config", str(path), *flags])
            assert config.vq_model == found
    (config,) = parse_recipe("", generator, args=["--config", str(tmp_path / "new.yaml")])
    assert (config.vq_model, config.codes_dir) == ("u", "c")


def test_choices_are_shown_and_checked(capsys):
    with pytest.raises(SystemExit):
        parse_recipe("", ("generator", GeneratorTrainingConfig), args=["--help"])
    help = capsys.readouterr().out
    assert "{class,text}" in help and "{B,L,XL,XXL,XXXL,1B,3B,7B}" in help and "{no,bf16,fp16}" in help
    assert get_args(get_args(get_type_hints(GeneratorTrainingConfig)["variant"])[0]) == tuple(VARIANTS)
    for settings, message in (
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; expected 'no', 'bf16' or 'fp16'."),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'; expected 'linear', 'cosine'"),
        ({"adversarial_loss": "vanilla"}, "adversarial_loss is 'vanilla'; expected 'hinge' or 'non-saturating'."),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1."),
    ):
        with pytest.raises(FieldError, match=message) as raised:
            TokenizerTrainingConfig("out", **settings)
        assert [raised.value.field] == list(settings)


def test_dict_fields_are_json_on_the_command_line():
    flags = ["--codes_dir", "c", "--vq_model", "t", "--output_dir", "o", "--sampling_defaults", '{"top_k": 5}']
    (config,) = parse_recipe("", ("generator", GeneratorTrainingConfig), args=flags)
    assert config.sampling_defaults == {"top_k": 5}


def parse(path: Path) -> dict:
    """The sections of a recipe by name, as the stages get them."""
    sections = read_recipe(path)
    return {name: parse_recipe("", (name, SECTIONS[name]), args=["--config", str(path)])[0] for name in sections}


NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
IMAGENET = [name for name in NAMES if name.startswith("imagenet_")]


@pytest.fixture(scope="module")
def recipes():
    return {name: parse(RECIPES / f"{name}.yaml") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_stages_of_a_recipe_fit(recipes, name):
    """The paths of one stage are those of the next, and what no stage of the recipe makes, one of another does."""
    recipe = recipes[name]
    made = {
        stage: {other[stage].output_dir for other in recipes.values() if stage in other}
        for stage in ("vq_model", "generator", "clip")
    }
    assert "data" in recipe
    assert recipe.keys() & {"vq_model", "generator", "diffusion", "classifier", "prior", "clip"}
    if "vq_model" in recipe:
        assert recipe["vq_model"].init_from in made["vq_model"] | {None, "emoji"}
    if "generator" in recipe:
        codes, generator = recipe["codes"], recipe["generator"]
        assert codes.vq_model == generator.vq_model and codes.output_dir == generator.codes_dir
        others = made["vq_model"] | {"emoji"}
        assert codes.vq_model in ({recipe["vq_model"].output_dir} if "vq_model" in recipe else others)
        assert generator.init_from in made["generator"] | {None, "emoji"}
        if generator.stored_states:
            columns = ["image"] if codes.clip else codes.text_columns
            assert {"{" + column + "}" for column in columns} == set(generator.caption_templates)
            assert codes.clip in made["clip"] | {None}


def test_no_two_recipes_write_to_one_folder(recipes):
    """But for codes, which several generators may share if all that decides them is the same."""
    written, codes = [], {}
    for recipe in recipes.values():
        for stage, config in recipe.items():
            if stage == "codes":
                assert codes.setdefault(config.output_dir, (recipe["data"], config)) == (recipe["data"], config)
            elif stage != "data":
                written.append(config.output_dir)
    assert len(set(written)) == len(written) and not set(written) & set(codes)


def test_optimization_is_the_papers(recipes):
    """Sections 3.1 to 3.3 of arXiv 2406.06525, and the batch sizes that its authors gave for XXL and 3B."""
    for name in (*IMAGENET, "laion_stage1", "laion_stage2"):
        generator = recipes[name]["generator"]
        assert generator.batch_size == (512 if generator.variant in ("XXL", "3B") else 256)
        assert generator.learning_rate == pytest.approx(1e-4 * generator.batch_size / 256)
        assert (generator.lr_scheduler, generator.lr_warmup_steps) == ("constant_with_warmup", 0)
        assert (generator.adam_beta1, generator.adam_beta2, generator.weight_decay) == (0.9, 0.95, 0.05)
        assert (generator.max_grad_norm, generator.dropout, generator.condition_dropout) == (1.0, 0.1, 0.1)
        assert (generator.mixed_precision, generator.ema_decay) == ("bf16", 0)
        assert generator.text_learning_rate is None
    tokenizer = recipes["tokenizer_imagenet"]["vq_model"]
    assert (tokenizer.num_train_epochs, tokenizer.batch_size, tokenizer.learning_rate) == (40, 128, 1e-4)
    assert (tokenizer.lr_scheduler, tokenizer.lr_warmup_steps) == ("constant_with_warmup", 0)
    assert (tokenizer.num_vq_embeddings, tokenizer.vq_embed_dim, len(tokenizer.block_out_channels)) == (16384, 8, 5)
    assert (tokenizer.l1_weight, tokenizer.l2_weight, tokenizer.perceptual_weight) == (0, 1, 1)
    assert (tokenizer.commit_weight, tokenizer.codebook_weight, tokenizer.entropy_weight) == (0.25, 1, 0)
    assert (tokenizer.discriminator, tokenizer.adversarial_weight, tokenizer.discriminator_start) == (
        "patchgan",
        0.5,
        20_000,
    )


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipes_are_named_for_what_they_train(recipes, name):
    _, size, variant = name.split("_")
    recipe = recipes[name]
    assert (recipe["data"].image_size, recipe["generator"].variant) == (int(size), variant)
    assert (recipe["generator"].conditioning, recipe["generator"].num_train_epochs) == ("class", 300)
    assert recipe["codes"].grids_per_image == 20  # ten crops out of 1.1, ten out of 1.05
    assert recipe["data"].test_split == "validation"


def test_laion_goes_from_256_to_512_pixels(recipes):
    first, second = recipes["laion_stage1"], recipes["laion_stage2"]
    assert (first["data"].image_size, second["data"].image_size) == (256, 512)
    assert second["generator"].init_from == first["generator"].output_dir
    assert first["generator"].condition_length == second["generator"].condition_length == 120
    assert sorted(second["generator"].caption_templates.values()) == [0.3, 0.7]
    assert {recipe["codes"].grids_per_image for recipe in (first, second)} == {1}
    # Each step of the preparation reads what the one before wrote.
    made = [second[stage].output_dir for stage in ("score", "filter", "recaption")]
    read = [second[stage].dataset.removesuffix("/*.parquet") for stage in ("filter", "recaption", "data")]
    assert made == read
    assert second["recaption"].long_caption_column in second["codes"].text_columns
