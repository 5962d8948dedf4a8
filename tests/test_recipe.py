"""Recipes: sections, overrides, and what is said of mistakes before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.data.extraction import CodeExtractionConfig  # noqa: E402
from llamagen_hf.data.filtering import FilterConfig  # noqa: E402
from llamagen_hf.data.recaptioning import RecaptionConfig  # noqa: E402
from llamagen_hf.data.scoring import ScoreConfig  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.training.generator_config import GeneratorTrainingConfig  # noqa: E402
from llamagen_hf.training.recipe import parse_recipe  # noqa: E402
from llamagen_hf.training.tokenizer_config import TokenizerTrainingConfig  # noqa: E402


RECIPES = Path(__file__).parents[1] / "pipelines" / "recipes"
SECTIONS = {
    "data": DataConfig,
    "tokenizer": TokenizerTrainingConfig,
    "codes": CodeExtractionConfig,
    "generator": GeneratorTrainingConfig,
    "filter": FilterConfig,
    "score": ScoreConfig,
    "recaption": RecaptionConfig,
}


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
        ("tokenizer: {output_dir: out, batch_size: many}", [], "has batch_size: 'many'; it must be int"),
        ("tokenizer: {output_dir: out, batch_size: 3.5}", [], "has batch_size: 3.5; it must be int"),
        ("tokenizer: {output_dir: out, decoder_only: 1}", [], "has decoder_only: 1; it must be bool"),
        ("tokenizer: {output_dir: out, learning_rate: fast}", [], "has learning_rate: 'fast'; it must be float"),
        (
            "tokenizer: {output_dir: out, block_out_channels: [8, x]}",
            [],
            "block_out_channels: [8, 'x']; it must be list",
        ),
        ("tokenizer: {output_dir: out, batch_size: 0}", [], "batch_size is 0; it must be at least 1"),
        ("tokenizer: {output_dir: out, discriminator: gan}", [], "expected patchgan, stylegan or null"),
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
    path.write_text("tokenizer: {output_dir: out, batch_size: 3, learning_rate: 1e-3, discriminator: null}")
    (config,) = parse_recipe(
        "", ("tokenizer", TokenizerTrainingConfig), args=["--config", str(path), "--batch_size", "5"]
    )
    expected = TokenizerTrainingConfig("out", batch_size=3, learning_rate=1e-3, discriminator=None)
    assert replace(config, batch_size=3) == expected
    assert config.batch_size == 5


def test_dict_fields_are_json_on_the_command_line():
    flags = ["--codes_dir", "c", "--tokenizer", "t", "--output_dir", "o", "--sampling_defaults", '{"top_k": 5}']
    (config,) = parse_recipe("", ("generator", GeneratorTrainingConfig), args=flags)
    assert config.sampling_defaults == {"top_k": 5}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_whole(path):
    """Each section parses, and the paths of one stage are those of the next."""
    import yaml

    sections = {name: SECTIONS[name] for name in yaml.safe_load(path.read_text())}
    parsed = {name: parse_recipe("", (name, kind), args=["--config", str(path)])[0] for name, kind in sections.items()}
    assert {"data", "codes", "generator"} <= parsed.keys()
    assert parsed["codes"].tokenizer == parsed["generator"].tokenizer
    assert parsed["codes"].output_dir == parsed["generator"].codes_dir
    if "tokenizer" in parsed:
        assert parsed["tokenizer"].output_dir == parsed["codes"].tokenizer
