"""Loading from the Hub takes another path through diffusers than loading from a folder, so it has its own test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_hub import fake_hub
from tiny import build_class_pipeline, build_text_pipeline, generators
from tiny_diffusion import build_diffusion_pipeline

from llamagen_hf import PixelDiffusionPipeline


PUSH = """
import sys
from llamagen_hf import AutoregressiveImagePipeline

pipe = AutoregressiveImagePipeline.from_pretrained(sys.argv[1])
pipe.push_to_hub(sys.argv[2], token="hf_token")
try:
    AutoregressiveImagePipeline.from_pretrained("user/absent")
except OSError as error:
    print(error)
"""

DRAW = """
import json, sys, torch
from llamagen_hf import AutoregressiveImagePipeline

pipe = AutoregressiveImagePipeline.from_pretrained(sys.argv[1])
assert {p.dtype for c in (pipe.vq_model, pipe.transformer) for p in c.parameters()} == {torch.float32}
codes = pipe(**json.loads(sys.argv[2]), generator=torch.Generator().manual_seed(3), output_type="codes").images
print(json.dumps(codes.tolist()))
"""


def python(script, *args, **env):
    """Run `script` in a fresh process: the Hub's address is read at import."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run(
        [sys.executable, "-c", script, *args], env=clean | env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""


@pytest.mark.slow  # three processes each, since the Hub's address is read at import
@pytest.mark.parametrize(
    "build, condition",
    [
        (build_class_pipeline, {"class_labels": ["goldfish", 4]}),
        (build_text_pipeline, {"prompt": ["a red apple", "a fish"]}),
    ],
)
def test_pushed_equals_loaded_online_and_offline(tmp_path, build, condition):
    pipe = build()
    pipe.save_pretrained(tmp_path / "pipe")
    (seed,) = generators(3)
    expected = pipe(**condition, generator=seed, output_type="codes").images.tolist()

    env = {"HF_HOME": str(tmp_path / "home")}
    with fake_hub() as hub:
        env |= {"HF_ENDPOINT": hub.url}
        assert "no repository" in python(PUSH, str(tmp_path / "pipe"), "user/tiny", **env)
        files = hub.repos["user/tiny"][-1]
        assert "model_index.json" in files and "vq_model/config.json" in files
        assert not [name for name in files if name.endswith(".py")]
        assert [name for name, data in files.items() if str(tmp_path).encode() in data] == []
        online = python(DRAW, "user/tiny", json.dumps(condition), **env)
        assert json.loads(online) == expected
    offline = python(DRAW, "user/tiny", json.dumps(condition), HF_HUB_OFFLINE="1", **env)
    assert json.loads(offline) == expected


def test_every_weight_survives_a_round_trip(tmp_path, text_pipe):
    text_pipe.save_pretrained(tmp_path)
    loaded = type(text_pipe).from_pretrained(tmp_path)
    for name in ("vq_model", "transformer", "text_encoder"):
        before, after = getattr(text_pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    index = json.loads(Path(tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["llamagen_hf", "LlamaGenForConditionalGeneration"]


def test_loaded_weights_are_aligned_in_memory(tmp_path):
    """As those of a new model are. Some CPUs round otherwise where they are not."""
    build_diffusion_pipeline().save_pretrained(tmp_path)
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path)
    tensors = [*pipe.unet.parameters(), *pipe.unet.buffers(), *pipe.text_encoder.parameters()]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
