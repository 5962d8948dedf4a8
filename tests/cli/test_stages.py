"""The stages as a user starts them, one after the other, on 40 emoji (Fluent Emoji, MIT, Microsoft Corporation)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import generator_config, tokenizer_config


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf import AutoregressiveImagePipeline  # noqa: E402


ROOT = Path(__file__).parents[2]
EMOJI = Path(__file__).parents[1] / "emoji"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


def run(command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **kwargs)


def write_recipe(folder: Path) -> Path:
    """A recipe for a folder with a metadata.jsonl and no test split."""
    recipe = {
        "data": {"dataset": str(EMOJI), "image_size": 32, "test_fraction": 0.2},
        "vq_model": vars(tokenizer_config(folder / "tokenizer")),
        "codes": {"vq_model": str(folder / "tokenizer"), "output_dir": str(folder / "codes")},
        "generator": vars(generator_config(folder / "pipeline", folder / "tokenizer", folder / "codes"))
        | {"caption_templates": {"{caption}": 1, "{tags}": 0.5, "{group}": 0.5}},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


@pytest.mark.slow
def test_from_forty_emoji_to_an_image(tmp_path):
    recipe = write_recipe(tmp_path)
    reports = {}
    for stage in ("train_tokenizer", "extract_codes", "train_generator"):
        result = run([*LAUNCH, ROOT / "pipelines" / f"{stage}.py", "--config", recipe])
        assert result.returncode == 0, result.stderr[-3000:]
        reports[stage] = json.loads(result.stdout[result.stdout.index("{") :])
    assert reports["extract_codes"]["rows"] == {"train": 32, "test": 8}
    assert reports["train_tokenizer"]["test_psnr"] > 0 and reports["train_generator"]["test_loss"] > 0
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("a red apple").images[0].size == (32, 32)
    image = tmp_path / "apple.png"
    llamagen = Path(sys.executable).parent / "llamagen"
    result = run([llamagen, "generate", "a red apple", "--checkpoint", tmp_path / "pipeline", "--output", image])
    assert result.returncode == 0 and image.is_file(), result.stderr


@pytest.mark.slow
def test_the_same_stages_by_the_command_line(tmp_path):
    recipe = write_recipe(tmp_path)
    llamagen = Path(sys.executable).parent / "llamagen"
    for stage in ("train-tokenizer", "extract-codes", "train-generator"):
        result = run([llamagen, stage, "--config", recipe])
        assert result.returncode == 0, result.stderr[-3000:]
    adapter = [llamagen, "train-generator", "--config", recipe, "--init_from", tmp_path / "pipeline",
               "--lora-rank", "2", "--output_dir", tmp_path / "adapter", "--micro_batch_size", "2"]  # fmt: skip
    result = run(adapter)
    assert result.returncode == 0, result.stderr[-3000:]
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "pipeline")
    pipe.load_lora_weights(tmp_path / "adapter")
    assert pipe("a cat").images[0].size == (32, 32)


@pytest.mark.slow
def test_mistakes_are_one_sentence_and_leave_no_folder(tmp_path):
    """All through one process, since each takes seconds to start."""
    recipe = write_recipe(tmp_path)
    script = f"""
import sys
from llamagen_cli import stages
for stage, flags in (
    ("train-tokenizer", ["--dataset", "./absent"]),
    ("train-tokenizer", ["--image_column", "photo"]),
    ("extract-codes", []),
    ("train-generator", []),
    ("train-generator", ["--variant"]),
    ("prepare", ["sift"]),
):
    try:
        stages.run_stage(stage, [*(["--config", {str(recipe)!r}] if stage != "prepare" else []), *flags])
    except SystemExit as exit:
        print(exit.code, file=sys.stderr)
"""
    result = run([sys.executable, "-c", script], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 6 and "Traceback" not in result.stderr, result.stderr
    messages = [
        "'./absent' can't be read: there is no such folder",
        "has no column 'photo'; it has image, caption",
        "There is no image tokenizer",
        "There is no image tokenizer",
        "expected one argument",
        "'sift' is not one of filter, score, recaption",
    ]
    for error, message in zip(errors, messages, strict=True):
        assert message in error
    assert not (tmp_path / "codes").exists() and not (tmp_path / "pipeline").exists()
