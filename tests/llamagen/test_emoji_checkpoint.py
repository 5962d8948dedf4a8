"""The checkpoint that ships with the package."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import build_class_pipeline, generators

from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.autoencoders import load_autoencoder
from llamagen_hf.evaluation.run import is_checkpoint
from llamagen_hf.loading.checkpoint import EMOJI_CHECKPOINT


@pytest.fixture(scope="module")
def pipe():
    pipe = AutoregressiveImagePipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_half_precision_and_documented():
    files = [path for path in EMOJI_CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {"README.md", "contact_sheet.png", "model_index.json"} <= {path.name for path in files}
    for path in EMOJI_CHECKPOINT.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}
    card = (EMOJI_CHECKPOINT / "README.md").read_text(encoding="utf-8")
    for owner in ("Microsoft Corporation", "Google Inc", "Twitter, Inc", "Unicode, Inc"):
        assert owner in card


def test_a_folder_called_emoji_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_class_pipeline().save_pretrained("emoji")
    assert AutoregressiveImagePipeline.from_pretrained("emoji").condition_kind == "text"
    assert load_autoencoder("emoji").config.num_vq_embeddings == 4096
    for folder in ("./emoji", Path("emoji")):
        pipe = AutoregressiveImagePipeline.from_pretrained(folder)
        assert pipe.condition_kind == "class" and pipe.facts["checkpoint"] == "./emoji"
        assert load_autoencoder(folder).config.num_vq_embeddings == 64
    (tmp_path / "emoji" / "model_index.json").unlink()  # such as a folder of images
    assert is_checkpoint("emoji") and not is_checkpoint("./emoji")
    assert AutoregressiveImagePipeline.from_pretrained("emoji").facts["checkpoint"] == "emoji"


def test_it_draws_the_colour_that_the_prompt_names(pipe):
    channels = {"a red apple": 0, "a red heart": 0, "a green tree": 1, "a blue car": 2}
    seeds = list(range(8)) * len(channels)
    images = pipe(list(channels), num_images_per_prompt=8, generator=generators(*seeds), output_type="pt").images
    assert images.shape == (32, 3, 64, 64)
    for (prompt, channel), own in zip(channels.items(), images.split(8), strict=True):
        drawn = own.amin(1) < 0.8  # all but the white ground
        colour = torch.stack([own[:, c][drawn].mean() for c in range(3)])
        assert colour.argmax() == channel, prompt


def test_prompts_of_any_kind_draw(pipe):
    prompts = ["", "food-fruit", "a dog, noto style", "日本", "a " * 300]
    assert len(pipe(prompts).images) == 5
