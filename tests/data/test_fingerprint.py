"""Fingerprints of datasets, checkpoints and pipelines, and the words for what changed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import build_class_pipeline, build_text_pipeline
from tiny_evaluation import build_dit_pipeline
from tiny_images import paint, write_captions, write_images
from transformers import ByT5Tokenizer


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")


from llamagen_hf.data import fingerprint  # noqa: E402
from llamagen_hf.data.fingerprint import (  # noqa: E402
    describe_changes,
    fingerprint_checkpoint,
    fingerprint_dataset,
    fingerprint_module,
    fingerprint_pipeline,
)
from llamagen_hf.data.source import DataConfig  # noqa: E402


def test_the_same_files_elsewhere_are_the_same(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "images")
    first = fingerprint_dataset(str(folder), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert fingerprint_dataset("images", "out") == first
    os.utime(folder / "0.png")
    (folder / "README.md").write_text("mine again")
    (folder / ".ipynb_checkpoints").mkdir()
    paint(folder / ".ipynb_checkpoints" / "0.png", 3)
    paint(folder / "._0.png", 3)
    (tmp_path / "link").symlink_to(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile))
    (folder / "out").mkdir()
    paint(folder / "out" / "sample.png", 3)  # results in the midst of the images
    (folder / "above").symlink_to(tmp_path)
    for place in ("images", "copy", "link"):
        assert describe_changes(first, fingerprint_dataset(place, folder / "out")) == ""
    pattern = fingerprint_dataset("images/*.png", "out")
    assert describe_changes(pattern, fingerprint_dataset(f"{tmp_path}/copy/*.png", "out")) == ""
    assert set(pattern["the dataset"]) == {f"{index}.png" for index in range(6)}


@pytest.mark.parametrize("limit", [fingerprint.HASHED_BYTES, 0])
def test_changes_are_named(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(fingerprint, "HASHED_BYTES", limit)  # small sets are hashed, large ones are not
    folder = write_images(tmp_path / "images")
    first = json.loads(json.dumps(fingerprint_dataset(str(folder), tmp_path)))
    moved = fingerprint_dataset(str(folder.rename(tmp_path / "moved")), tmp_path)
    assert describe_changes(first, moved) == ""
    folder = tmp_path / "moved"
    for index in (1, 2, 4, 5):
        paint(folder / f"{index}.png", 7)
    (folder / "3.png").unlink()
    paint(folder / "new.png", 9)
    assert describe_changes(first, fingerprint_dataset(str(folder), tmp_path)) == (
        "4 files of the dataset were changed (1.png, 2.png, 4.png, ...), 1 file of the dataset was added (new.png), "
        "1 file of the dataset was removed (3.png)"
    )


def test_a_small_set_that_was_repainted_without_another_time_or_size_is_another(tmp_path):
    path = write_images(tmp_path / "images") / "metadata.jsonl"
    first, before = fingerprint_dataset(str(path.parent), tmp_path), path.stat()
    write_captions(path.parent, "a shape")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    changes = describe_changes(first, fingerprint_dataset(str(path.parent), tmp_path))
    assert changes == "1 file of the dataset was changed (metadata.jsonl)"


def test_images_that_a_table_names_belong_to_it(tmp_path):
    folder = write_images(tmp_path / "images")
    table = tmp_path / "rows.csv"
    table.write_text("image,caption\n" + "".join(f"{folder}/{index}.png,shade {index}\n" for index in range(6)))
    for streaming in (False, True):
        data = DataConfig(str(table), test_fraction=0.0, streaming=streaming)
        paint(folder / "3.png", 120)
        first = fingerprint_dataset(data.dataset, tmp_path, [data.load("train"), None], "image")
        paint(folder / "3.png", 5)
        changes = describe_changes(first, fingerprint_dataset(data.dataset, tmp_path, [data.load("train")], "image"))
        assert changes == f"1 file of the images that the dataset names was changed ({folder}/3.png)"


def test_a_dataset_of_the_hub_is_told_by_its_commit(monkeypatch, caplog, tmp_path):
    commits = iter(["a1", "a1", "b2"])
    info = type("Info", (), {})

    def dataset_info(self, name):
        found = info()
        found.sha = next(commits)
        return found

    monkeypatch.setattr(fingerprint.HfApi, "dataset_info", dataset_info)
    first, same, other = (fingerprint_dataset("user/images", tmp_path) for _ in range(3))
    assert describe_changes(first, same) == "" and "user/images changed" in describe_changes(first, other)

    def offline(self, name):
        raise fingerprint.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(fingerprint.HfApi, "dataset_info", offline)
    unknown = fingerprint_dataset("user/images", tmp_path)
    assert describe_changes(first, unknown) == "" and "whether 'user/images' changed is not known" in caplog.text
    assert "user/others is new" in describe_changes(first, fingerprint_dataset("user/others", tmp_path))


def test_a_checkpoint_in_the_cache_is_told_by_its_revision(tmp_path):
    folder = tmp_path / "snapshots" / "0123abcd"
    build_class_pipeline().save_pretrained(folder)
    assert fingerprint_checkpoint(folder) == fingerprint_checkpoint(folder / "transformer") == "0123abcd"
    assert "config.json" in fingerprint_checkpoint(folder.rename(tmp_path / "own") / "transformer")


# Weights


def test_all_that_decides_what_a_pipeline_draws_is_told():
    first = fingerprint_pipeline(build_text_pipeline())
    pipe = build_text_pipeline()
    pipe("a cat")  # leaves no trace
    assert fingerprint_pipeline(pipe) == first
    pipe.tokenizer = ByT5Tokenizer(extra_ids=3)
    pipe.text_encoder.shared.weight.data[0] += 1
    pipe.register_to_config(sampling_defaults={"top_k": 3})
    changes = describe_changes(first, fingerprint_pipeline(pipe))
    assert "the weights of text_encoder changed" in changes and "the vocabulary of tokenizer changed" in changes
    assert "the settings of the pipeline changed" in changes and "transformer" not in changes
    pipe = build_text_pipeline().to(torch.bfloat16)
    assert "the weights of transformer changed" in describe_changes(first, fingerprint_pipeline(pipe))


def test_a_scheduler_and_offloaded_weights():
    pipe = build_dit_pipeline()
    first = fingerprint_pipeline(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert next(pipe.transformer.parameters()).is_meta
    assert fingerprint_pipeline(pipe) == first
    pipe.scheduler.register_to_config(num_train_timesteps=7)
    assert describe_changes(first, fingerprint_pipeline(pipe)) == "the settings of scheduler changed"


def test_adapters_and_their_scales_are_told():
    pytest.importorskip("peft")
    from llamagen_hf.loading.lora import lora_config

    model = build_class_pipeline().transformer
    seen = {fingerprint_module(model)}
    model.add_adapter(lora_config(2, 2))
    seen.add(fingerprint_module(model))
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 0.5
    seen.add(fingerprint_module(model))
    model.disable_adapters()
    assert len(seen | {fingerprint_module(model)}) == 4


def test_quantized_tensors_are_read_part_by_part():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    layer = torch.nn.Linear(3, 2)
    parts = [layer.weight.detach().clone() for _ in range(2)]
    layer.weight = torch.nn.Parameter(two_tensor.TwoTensor(*parts))
    first = fingerprint_module(layer)
    assert first == fingerprint_module(layer)
    parts[1][0, 0] += 1
    assert fingerprint_module(layer) != first


@pytest.mark.slow
def test_another_process_finds_the_same(tmp_path):
    build_class_pipeline().save_pretrained(tmp_path / "own")
    code = (
        "import sys; from llamagen_hf import AutoregressiveImagePipeline\n"
        "from llamagen_hf.data.fingerprint import fingerprint_pipeline\n"
        "print(fingerprint_pipeline(AutoregressiveImagePipeline.from_pretrained(sys.argv[1])))"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code, tmp_path / "own"], env=env, capture_output=True, text=True)
    assert found.stdout.strip() == str(fingerprint_pipeline(build_class_pipeline())), found.stderr
