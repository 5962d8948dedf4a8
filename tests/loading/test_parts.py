"""Pipelines of pipelines: what is saved, loaded, moved and offloaded reaches the parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from fake_hub import fake_hub
from safetensors.torch import load_file, save_file
from tiny import generators
from tiny_cascade import BASES, build_cascade, build_nested_cascade, quiet

from llamagen_hf import AutoregressiveImagePipeline, CascadePipeline
from llamagen_hf.families import load_pipeline
from llamagen_hf.loading.offloading import is_offloaded


def draw(pipe, kind="text"):
    return pipe(**BASES[kind][1], generator=generators(3)).images[0].tobytes()


def models(pipe):
    for part in pipe.parts.values():
        if isinstance(part, CascadePipeline):
            yield from models(part)
        else:
            yield from (each for each in part.components.values() if isinstance(each, torch.nn.Module))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "cascade"
    build_cascade().save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    """A copy to damage."""
    folder = tmp_path / "copied"
    for path in saved.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(saved)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["text", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(BASES)[1:])])
def test_saved_equals_loaded(kind, tmp_path):
    cascade = build_cascade(kind)
    cascade.save_pretrained(tmp_path / "one")
    loaded = quiet(CascadePipeline.from_pretrained(tmp_path / "one"))
    assert type(loaded.base) is type(cascade.base) and draw(loaded, kind) == draw(cascade, kind)
    loaded.save_pretrained(tmp_path / "two")
    assert draw(quiet(load_pipeline(tmp_path / "two")), kind) == draw(cascade, kind)
    index = json.loads((tmp_path / "one" / "model_index.json").read_text())
    assert index["upsampler"] == ["llamagen_hf", "PixelDiffusionPipeline"]
    texts = [path.read_text() for path in (tmp_path / "two").rglob("*.json")]
    assert not [text for text in texts if str(tmp_path) in text]


def test_a_nested_cascade_is_saved_and_loaded(tmp_path):
    cascade = build_nested_cascade()
    cascade.save_pretrained(tmp_path)
    loaded = quiet(CascadePipeline.from_pretrained(tmp_path, dtype=torch.float32))
    assert draw(loaded) == draw(cascade)
    facts = loaded.facts
    assert facts["checkpoint"] == str(tmp_path)  # of the whole: its parts have none of their own
    assert "checkpoint" not in facts["upsampler"] and "checkpoint" not in facts["upsampler"]["upsampler"]
    parameters = loaded("a", generator=generators(1)).parameters[0]
    assert parameters["checkpoint"] == str(tmp_path) and "checkpoint" not in parameters["upsampler"]


def test_diffusers_own_loader_finds_it(saved):
    loaded = quiet(DiffusionPipeline.from_pretrained(saved))
    assert type(loaded) is CascadePipeline and draw(loaded) == draw(build_cascade())


def test_the_parts_keep_their_own_origin_if_they_were_loaded_apart(saved):
    base = AutoregressiveImagePipeline.from_pretrained(saved / "base")
    cascade = quiet(CascadePipeline(base, load_pipeline(saved / "upsampler")))
    parameters = cascade("a", generator=generators(1)).parameters[0]
    assert parameters["checkpoint"] == str(saved / "base")
    assert parameters["upsampler"]["checkpoint"] == str(saved / "upsampler")


def test_a_part_can_be_given(saved):
    other = build_cascade(text=False).upsampler
    loaded = CascadePipeline.from_pretrained(saved, upsampler=other)
    assert loaded.upsampler is other


@pytest.mark.parametrize("kind", ["nested", "ddpm"])
def test_dtype_and_device_reach_all_models(kind):
    cascade = build_nested_cascade() if kind == "nested" else build_cascade(kind)
    assert len(list(models(cascade))) == (6 if kind == "nested" else 3)
    assert cascade.to(torch.bfloat16) is cascade and cascade.dtype == torch.bfloat16
    assert {model.dtype for model in models(cascade)} == {torch.bfloat16}
    if kind == "nested":  # diffusers' pipeline can't turn bfloat16 into images
        assert cascade("a red apple").images[0].size == (32, 32)
    cascade.to("meta", torch.float32)
    assert cascade.device.type == "meta" and {model.device.type for model in models(cascade)} == {"meta"}


def test_dtype_of_loading_reaches_all_models(saved):
    loaded = CascadePipeline.from_pretrained(saved, dtype=torch.bfloat16)
    assert {model.dtype for model in models(loaded)} == {torch.bfloat16}
    assert {model.dtype for model in models(CascadePipeline.from_pretrained(saved))} == {torch.float32}
    loaded = CascadePipeline.from_pretrained(saved, dtype={"upsampler": torch.bfloat16})
    assert loaded.base.dtype == torch.float32 and loaded.upsampler.unet.dtype == torch.bfloat16


def test_a_variant_reaches_all_models(tmp_path):
    cascade = build_cascade().to(torch.float16)
    cascade.save_pretrained(tmp_path, variant="fp16")
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert names == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
    loaded = CascadePipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.facts["variant"] == "fp16"
    for before, after in zip(models(cascade), models(loaded), strict=True):
        before, after = before.state_dict(), after.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def is_hooked(model):
    return any(hasattr(each, "_hf_hook") for each in model.modules())


@pytest.mark.parametrize("method", ["model", "group"])
def test_offloading_reaches_all_models_and_changes_nothing(method):
    cascade = build_nested_cascade()
    expected = draw(cascade)
    if method == "group":
        cascade.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        assert all(map(is_offloaded, models(cascade)))
    else:
        cascade.enable_model_cpu_offload(device="cpu")
        assert all(map(is_hooked, models(cascade)))
    assert draw(cascade) == expected
    cascade.maybe_free_model_hooks()
    assert draw(cascade) == expected


def test_offloading_of_layers_reaches_all_models_and_is_taken_off():
    cascade = build_nested_cascade()
    cascade.enable_sequential_cpu_offload(device="cpu")
    assert all(map(is_hooked, models(cascade)))
    cascade.remove_all_hooks()
    assert not any(map(is_hooked, models(cascade)))


def test_progress_bars_of_all_parts_are_configured():
    cascade = build_cascade()
    cascade.set_progress_bar_config(disable=False, desc="apples")
    assert [part._progress_bar_config["desc"] for part in cascade.parts.values()] == ["apples", "apples"]


def truncate(folder):
    path = folder / "upsampler" / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_weight(folder):
    path = folder / "upsampler" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("conv_in.bias")
    save_file(weights, path, metadata={"format": "pt"})


def remove_the_index(folder):
    (folder / "base" / "model_index.json").unlink()


def rename_the_class(folder, name="Unknown"):
    path = folder / "base" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))


def name_a_module(folder):
    rename_the_class(folder, ["pipeline", "Evil"])
    (folder / "base" / "pipeline.py").write_text("raise SystemExit('code was run')")


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, "damaged: unet/diffusion_pytorch_model.safetensors"),
        (drop_a_weight, "conv_in.bias"),
        (remove_the_index, "The checkpoint is incomplete: base/model_index.json is missing"),
        (rename_the_class, "The base of this checkpoint is of class 'Unknown', which neither diffusers nor llamagen"),
        (name_a_module, "is of class \\['pipeline', 'Evil'\\], which neither diffusers nor llamagen has"),
    ],
)
def test_damaged_parts_are_named_in_one_sentence(copied, damage, message):
    damage(copied)
    with pytest.raises((OSError, ValueError), match=message):
        CascadePipeline.from_pretrained(copied)


def test_a_part_of_diffusers_is_checked_too(tmp_path):
    build_cascade("ddpm").save_pretrained(tmp_path)
    path = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights.pop("conv_in.bias")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises((OSError, ValueError), match="conv_in.bias"):
        CascadePipeline.from_pretrained(tmp_path)


def test_other_checkpoints_and_arguments_are_refused(saved):
    with pytest.raises(OSError, match="'emoji' holds another pipeline, of class 'AutoregressiveImagePipeline'"):
        CascadePipeline.from_pretrained()
    with pytest.raises(ValueError, match="loaded without `trust_remote_code`"):
        CascadePipeline.from_pretrained(saved, trust_remote_code=True)
    with pytest.raises(OSError, match="no folder and no repository"):
        CascadePipeline.from_pretrained("no/such/folder")


DRAW = """
import sys, torch
from llamagen_hf import CascadePipeline

pipe = CascadePipeline.from_pretrained(sys.argv[1])
output = pipe("a red apple", generator=torch.Generator().manual_seed(3))
print(output.images[0].tobytes().hex(), output.parameters[0]["checkpoint"])
"""

PUSH = """
import sys
from llamagen_hf import CascadePipeline

CascadePipeline.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2], token="hf_token")
"""


def python(script, *args, **env):
    """Run `script` in a fresh process: the Hub's address is read at import."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run([sys.executable, "-c", script, *args], env=clean | env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()


@pytest.mark.slow  # three processes, since the Hub's address is read at import
def test_pushed_equals_loaded_online_and_offline(tmp_path, saved):
    expected = draw(build_cascade()).hex() + " user/tiny"
    env = {"HF_HOME": str(tmp_path / "home")}
    with fake_hub() as hub:
        env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        python(PUSH, str(saved), "user/tiny", **env)
        files = hub.repos["user/tiny"][-1]
        assert "base/transformer/config.json" in files and "upsampler/unet/config.json" in files
        assert not [name for name in files if name.endswith(".py")]
        assert [name for name, data in files.items() if str(Path(saved).parent).encode() in data] == []
        assert python(DRAW, "user/tiny", **env).splitlines()[-1] == expected
    assert python(DRAW, "user/tiny", **env | {"HF_HUB_OFFLINE": "1"}).splitlines()[-1] == expected
