"""`llamagen generate` with a prior and a decoder: prompts, variations, the same image again."""

import shlex

import pytest
from PIL import Image
from tiny import build_text_pipeline, generators
from tiny_unclip import build_unclip
from typer.testing import CliRunner

from llamagen_cli import app
from llamagen_hf.provenance import read_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline of both parts, one of another family, and an image to vary."""
    folder = tmp_path_factory.mktemp("unclip")
    build_unclip("autoregressive").save_pretrained(folder / "unclip")
    build_text_pipeline().save_pretrained(folder / "text")
    Image.new("RGB", (12, 12), "red").save(folder / "red.png")
    return folder


def generate(folder, *arguments):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    with Image.open(folder) as image:
        return image.tobytes()


def test_prompts_variations_and_the_same_again(folder, tmp_path):
    pipe, output = build_unclip("autoregressive"), tmp_path / "a.png"
    common = ("--checkpoint", folder / "unclip", "--seed", 3, "--guidance-scale", 2, "--output", output)
    drawn = generate(output, "a cat", *common)
    assert drawn == pipe("a cat", guidance_scale=2.0, generator=generators(3)).images[0].tobytes()
    assert read_parameters(output)["checkpoint"] == str(folder / "unclip")
    assert generate(tmp_path / "b.png", "--from", output, "--output", tmp_path / "b.png") == drawn

    varied = generate(output, "--variation-of", folder / "red.png", *common)
    image = Image.open(folder / "red.png")
    assert varied == pipe.variation(image, guidance_scale=2.0, generator=generators(3)).images[0].tobytes()
    assert generate(tmp_path / "b.png", "--from", output, "--output", tmp_path / "b.png") == varied


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("a --variation-of {}/red.png --checkpoint {}/unclip", "`--variation-of` takes the place of both."),
        ("--variation-of {}/red.png --checkpoint {}/text", "is for checkpoints with a prior and a decoder."),
        ("--checkpoint {}/unclip", "Pass either a prompt or `--class-label`."),
        ("a --steps 3 --checkpoint {}/unclip", "This checkpoint takes no `--steps`."),
        ("--class-label 1 --checkpoint {}/unclip", "This checkpoint takes no `--class-label`."),
        ("'a very long caption' --checkpoint {}/unclip", "is longer than the 12 positions that CLIP reads"),
    ],
)
def test_what_does_not_fit_is_one_sentence(folder, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["generate", *shlex.split(arguments.replace("{}", str(folder)))])
    assert result.exit_code == 1 and message in " ".join(result.output.split()), result.output
