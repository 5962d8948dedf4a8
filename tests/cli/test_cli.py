import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import build_class_pipeline, build_text_pipeline, generators
from typer.testing import CliRunner

import llamagen_cli
from llamagen_hf.provenance import read_parameters, save_png


run = CliRunner().invoke


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    build_text_pipeline().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def class_checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("class")
    build_class_pipeline().save_pretrained(path)
    return str(path)


def invoke(*arguments):
    return run(llamagen_cli.app, [str(argument) for argument in arguments])


def test_help_answers_without_importing_torch():
    script = (
        "import sys, llamagen_cli\n"
        "try:\n    llamagen_cli.app(['--help'])\n"
        "finally:\n    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "generate" in result.stdout and "convert" in result.stdout and "info" in result.stdout
    assert time.perf_counter() - start < 1


def test_generate_saves_a_png_that_says_how_it_was_made(text_checkpoint, tmp_path):
    output = tmp_path / "apple.png"
    result = invoke("generate", "a red apple", "--checkpoint", text_checkpoint, "--seed", 3, "--top-k", 9,
                    "--decoding-window", 4, "--output", output, "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    with Image.open(output) as image:
        assert image.size == (8, 8) and image.format == "PNG"
    facts = read_parameters(output)
    assert facts["prompt"] == "a red apple" and facts["seed"] == 3 and facts["top_k"] == 9
    assert facts["decoding_window"] == 4
    assert facts["guidance_scale"] == 4.0 and facts["temperature"] == 1.0  # the library's, not given here
    assert facts["checkpoint"] == text_checkpoint
    expected = build_text_pipeline()("a red apple", generator=generators(3)[0], top_k=9).images[0]
    with Image.open(output) as image:
        assert image.tobytes() == expected.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["apple.png"]


def test_count_grid_and_seeds(class_checkpoint, tmp_path):
    result = invoke("generate", "--class-label", "goldfish", "--checkpoint", class_checkpoint, "--count", 3,
                    "--seed", 5, "--output", tmp_path / "fish.png", "--grid", tmp_path / "grid.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fish-0.png", "fish-1.png", "fish-2.png", "grid.png"]
    assert [read_parameters(tmp_path / f"fish-{i}.png")["seed"] for i in range(3)] == [5, 6, 7]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (16, 16)
    # The seed of each is enough to generate it alone.
    alone = invoke("generate", "--class-label", "1", "--checkpoint", class_checkpoint, "--seed", 6,
                   "--output", tmp_path / "alone.png")  # fmt: skip
    assert alone.exit_code == 0
    with Image.open(tmp_path / "alone.png") as one, Image.open(tmp_path / "fish-1.png") as other:
        assert one.tobytes() == other.tobytes()


def test_the_best_of_several_candidates_needs_no_scorer(text_checkpoint, tmp_path):
    output = tmp_path / "apple.png"
    result = invoke("generate", "a red apple", "--checkpoint", text_checkpoint, "--num-candidates", 3, "--seed", 3,
                    "--output", output)  # fmt: skip
    assert result.exit_code == 0, result.output
    best = build_text_pipeline()("a red apple", num_candidates=3, generator=generators(3))
    with Image.open(output) as image:
        assert image.tobytes() == best.images[0].tobytes()
    assert read_parameters(output)["seed_index"] == best.parameters[0]["seed_index"] > 0  # not the first one


def test_output_is_named_after_the_prompt(text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("generate", "A red/apple!", "--checkpoint", text_checkpoint).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a-red-apple.png"]


def test_files_named_after_prompts_do_not_replace_others(text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompt, *more in (["🍎"], ["🍐"], ["a cat"], ["A cat!"], ["a cat", "--count", "2"], ["a-cat", "--count", "2"],
                          ["..."], ["nul"], ["🍎"], ["x" * 3000], ["苹" * 200]):  # fmt: skip
        result = invoke("generate", prompt, "--checkpoint", text_checkpoint, *more)
        assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["red-apple.png", "pear.png", "a-cat.png", "a-cat-2.png", "a-cat-0.png", "a-cat-1.png", "a-cat-2-0.png",
         "a-cat-2-1.png", "image.png", "nul-image.png", "red-apple-2.png", "x" * 100 + ".png", "苹" * 33 + ".png"]
    )  # fmt: skip
    assert read_parameters("red-apple-2.png")["prompt"] == read_parameters("red-apple.png")["prompt"] == "🍎"


def test_a_grid_does_not_replace_an_image(text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output, grid, count in (("a.png", "a.png", 1), ("a.png", tmp_path / "a-1.png", 2)):
        result = invoke("generate", "cat", "--checkpoint", text_checkpoint, "--output", output, "--grid", grid,
                        "--count", count)  # fmt: skip
        assert result.exit_code == 1 and "would replace an image" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_class_is_taken_by_name_before_its_id(tmp_path):
    names = {0: "0", 1: "2", 2: "dog"} | {i: f"thing {i}" for i in range(3, 10)}
    pipe = build_class_pipeline()
    pipe.transformer.config.id2label = names
    pipe.save_pretrained(tmp_path / "numbers")
    for label, seed in (("2", 1), ("dog", 2), ("5", 5)):
        output = tmp_path / f"{seed}.png"
        assert invoke("generate", "--class-label", label, "--checkpoint", tmp_path / "numbers", "--output", output
                      ).exit_code == 0  # fmt: skip
        expected = pipe(class_labels=seed, generator=generators(0)).images[0]
        with Image.open(output) as image:
            assert image.tobytes() == expected.tobytes()
    result = invoke("generate", "--class-label", "-1", "--checkpoint", tmp_path / "numbers")
    assert result.exit_code == 1 and "Class id -1 is out of range" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["generate", "苹果", "--output", "🍎.png"], ["info"]]
)
def test_a_console_of_another_encoding_does_not_matter(arguments, tmp_path):
    pipe = build_class_pipeline()
    pipe.transformer.config.id2label = {i: f"苹果 {i}" for i in range(10)}
    pipe.save_pretrained(tmp_path / "checkpoint")
    if arguments == ["info"]:
        arguments = ["info", "--checkpoint", "checkpoint"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, "-m", "llamagen_cli", *arguments]
    result = subprocess.run(command, capture_output=True, encoding="cp1252", env=environment, cwd=tmp_path)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    expected = {"generate": "Saved \\U0001f34e.png", "info": "\\u82f9\\u679c 1"}
    assert "--help" in arguments or expected[arguments[0]] in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Pass either a prompt or `--class-label`."),
        (["apple", "--class-label", "1"], "Pass either a prompt or `--class-label`."),
        (["--class-label", "1"], "This checkpoint is text-conditional"),
        (["apple", "--temperature", "-1"], "`temperature` is -1.0"),
        (["apple", "--guidance-scale", "nan"], "`guidance_scale` is nan"),
        (["apple", "--device", "warp"], "There is no device 'warp' here; try cpu."),
        (["apple", "--device", "meta"], "There is no device 'meta' here; try cpu."),
        (["apple", "--output", "apple.jpg"], "must end in .png"),
        (["apple", "--output", "no/such/folder/apple.png"], "can't be written"),
        (["apple", "--output", "folder.png"], "can't be written"),
        (["apple", "--checkpoint", "no/such/folder"], "There is no folder and no repository 'no/such/folder'"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_1(text_checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    if "--checkpoint" not in arguments:
        arguments = [*arguments, "--checkpoint", text_checkpoint]
    result = invoke("generate", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and "Traceback" not in result.output
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.png"]


@pytest.mark.parametrize("command", [["generate", "apple"], ["demo"]])
def test_choices_are_checked_and_listed(command):
    result = invoke(*command, "--dtype", "int8")
    assert result.exit_code == 2 and "Traceback" not in result.output
    words = " ".join(result.stderr.replace("│", "").split())
    assert "'--dtype'" in words and "'int8' is not one of 'float32', 'float16', 'bfloat16'" in words


def test_the_dtype_of_an_image_is_checked(text_checkpoint, tmp_path):
    facts = {"prompt": "apple", "checkpoint": text_checkpoint, "dtype": "int8", "device": "cpu"}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "image.png", facts)
    result = invoke("generate", "--from", tmp_path / "image.png")
    assert result.exit_code == 1 and "Error: The dtype is 'int8'; expected float32" in result.stderr


def test_an_image_of_the_fastest_dtype_is_drawn_again_in_it(text_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    options = ("--checkpoint", text_checkpoint, "--device", "cpu", "--dtype", "auto")
    assert invoke("generate", "apple", *options, "--output", tmp_path / "first.png").exit_code == 0
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a CPU that would choose another
    assert invoke("generate", "--from", tmp_path / "first.png", "--output", tmp_path / "again.png").exit_code == 0
    parameters = read_parameters(tmp_path / "first.png")
    assert parameters["dtype"] == "bfloat16" and read_parameters(tmp_path / "again.png") == parameters
    assert Image.open(tmp_path / "first.png").tobytes() == Image.open(tmp_path / "again.png").tobytes()


def test_info(class_checkpoint, text_checkpoint):
    text = invoke("info", "--checkpoint", text_checkpoint).stdout
    assert "8x8 pixels from 4x4 codes" in text and "text, 12 positions of width 16" in text
    classes = invoke("info", "--checkpoint", class_checkpoint).stdout
    assert "class, 10 classes" in classes and "1 goldfish" in classes and "transformer 0.0M" in classes


def test_convert_reports_what_is_wrong(tmp_path):
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "vq.pt")
    result = invoke("convert", "--vq-checkpoint", tmp_path / "vq.pt", "--transformer-checkpoint", tmp_path / "c2i.pt",
                    "--variant", "B", "--image-size", 256, "--output", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 1
    assert "These weights are not those of a LlamaGen tokenizer" in result.stderr
    assert not (tmp_path / "out").exists()


def test_convert_writes_a_pipeline(tmp_path, monkeypatch):
    from parity import released_state_dict

    from llamagen_hf.llamagen.conversion import VARIANTS

    monkeypatch.setitem(VARIANTS, "tiny", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
    torch.save({"model": released_state_dict("vq16_64")}, tmp_path / "vq.pt")
    shapes = {key: tuple(value.shape) for key, value in released_state_dict("c2i_tiny").items()}
    swiglu = {"w1": (256, 64), "w3": (256, 64), "w2": (64, 256)}
    shapes |= {"tok_embeddings.weight": (256, 64), "output.weight": (256, 64)}
    shapes |= {f"layers.{i}.feed_forward.{w}.weight": shape for i in (0, 1) for w, shape in swiglu.items()}
    torch.save({key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "c2i.pt")
    names = tmp_path / "names.json"
    names.write_text(json.dumps({str(i): f"class {i}" for i in range(10)}))
    result = invoke("convert", "--vq-checkpoint", tmp_path / "vq.pt", "--transformer-checkpoint", tmp_path / "c2i.pt",
                    "--variant", "tiny", "--image-size", 64, "--output", tmp_path / "out", "--id2label", names,
                    "--dtype", "float16")  # fmt: skip
    assert result.exit_code == 0, result.output
    result = invoke("generate", "--class-label", "class 7", "--checkpoint", tmp_path / "out",
                    "--output", tmp_path / "seven.png")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Path(tmp_path / "seven.png").is_file()
