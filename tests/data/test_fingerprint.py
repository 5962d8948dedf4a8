"""What is gone on with: results of the same input, wherever it lies by now; of another one they are refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import build_class_pipeline, build_text_encoder, build_text_pipeline, build_vq_model
from tiny_evaluation import build_dit_pipeline
from transformers import ByT5Tokenizer


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_training import generator_config, tokenizer_config, write_codes  # noqa: E402

from llamagen_hf.data import fingerprint  # noqa: E402
from llamagen_hf.data.filtering import FilterConfig, filter_rows  # noqa: E402
from llamagen_hf.data.fingerprint import (  # noqa: E402
    describe_changes,
    fingerprint_checkpoint,
    fingerprint_dataset,
    fingerprint_module,
    fingerprint_pipeline,
)
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.evaluation.images import open_images  # noqa: E402
from llamagen_hf.evaluation.sampling import SamplingConfig, sample_images  # noqa: E402
from llamagen_hf.llamagen.training.extraction import CodeExtractionConfig, extract_codes  # noqa: E402
from llamagen_hf.llamagen.training.generator_trainer import train_generator  # noqa: E402
from llamagen_hf.llamagen.training.vq_trainer import TokenizerTraining, train_tokenizer  # noqa: E402


def paint(path, shade):
    Image.new("RGB", (16, 16), (shade, 255 - shade, 0)).save(path)


def write_images(folder):
    """Six images with captions, and what no reader takes for a part of them."""
    folder.mkdir()
    for index in range(6):
        paint(folder / f"{index}.png", 40 * index)
    write_captions(folder, "a shade")
    (folder / "README.md").write_text("mine")
    return folder


def write_captions(folder, caption):
    lines = [json.dumps({"file_name": f"{index}.png", "caption": f"{caption} {index}"}) for index in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.parquet")}


# Files


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


# Extraction


@pytest.fixture
def extraction(tmp_path):
    """Runs one on `tmp_path / "images"`, by another name of the folder if need be."""
    write_images(tmp_path / "images")
    build_vq_model().save_pretrained(tmp_path / "tokenizer")
    build_text_encoder().save_pretrained(tmp_path / "text_encoder")
    ByT5Tokenizer().save_pretrained(tmp_path / "text_encoder")

    def run(dataset=None, tokenizer=None, text=False, **settings):
        data = DataConfig(str(dataset or tmp_path / "images"), image_size=8, test_fraction=0.0)
        if text:
            settings |= {"text_encoder": str(tmp_path / "text_encoder"), "text_columns": ["caption"]}
        tokenizer = tokenizer or str(tmp_path / "tokenizer")
        config = CodeExtractionConfig(tokenizer, str(tmp_path / "codes"), rows_per_shard=2, **settings)
        return extract_codes(data, config)["rows"]["train"]

    return run


def codes_of(folder):
    shards = sorted(str(path) for path in folder.glob("train-*.parquet"))
    return datasets.load_dataset("parquet", data_files=shards, split="train")


def test_codes_of_the_same_images_go_on(extraction, tmp_path, monkeypatch):
    extraction()
    (tmp_path / "codes" / "train-00001.parquet").unlink()
    before = times(tmp_path / "codes")
    os.utime(tmp_path / "images" / "2.png")
    monkeypatch.chdir(tmp_path)
    assert extraction(dataset="images") == 6
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "tokenizer").rename(tmp_path / "other_place")
    assert extraction(dataset=tmp_path / "elsewhere", tokenizer="other_place") == 6
    assert before.items() <= times(tmp_path / "codes").items()  # nothing was made again


def test_codes_of_other_images_are_refused_or_replaced(extraction, tmp_path):
    folder, codes = tmp_path / "images", tmp_path / "codes"
    extraction()
    before, first = times(codes), codes_of(codes)["codes"][:]
    (codes / "mine.txt").write_text("foreign")
    for change, message in (
        (lambda: paint(folder / "1.png", 200), r"1 file of the dataset was changed \(1.png\)"),
        (lambda: write_captions(folder, "another"), r"2 files of the dataset were changed \(1.png, metadata.jsonl\)"),
        (lambda: paint(folder / "6.png", 1), r"1 file of the dataset was added \(6.png\)"),
        (lambda: (folder / "0.png").unlink(), r"1 file of the dataset was removed \(0.png\)"),
    ):
        change()
        with pytest.raises(ValueError, match=f"{message}.*start over with --overwrite"):
            extraction()
    assert times(codes) == before
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": path.name, "caption": "new"}) for path in sorted(folder.glob("*.png")))
    )
    assert extraction(overwrite=True) == 6
    assert set(codes_of(codes)["caption"]) == {"new"} and codes_of(codes)["codes"][0] != first[1]
    assert (codes / "mine.txt").is_file() and extraction() == 6


def test_overwriting_also_changes_settings_and_weights(extraction, tmp_path):
    extraction(text=True)
    encoder = build_text_encoder()
    encoder.shared.weight.data += 1
    encoder.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match=r"1 file of the text encoder was changed \(model.safetensors\)"):
        extraction(text=True)
    with pytest.raises(ValueError, match="num_crops 1, not 2; .* or start over with --overwrite"):
        extraction(num_crops=2, text=True)
    assert extraction(num_crops=2, overwrite=True) == 6
    assert len(codes_of(tmp_path / "codes")["codes"][0]) == 2


def test_a_killed_overwriting_leaves_no_mixture(extraction, tmp_path, monkeypatch):
    codes = tmp_path / "codes"
    extraction()
    paint(tmp_path / "images" / "1.png", 200)

    class Killed(BaseException):
        pass

    remove = Path.unlink

    def unlink(path, missing_ok=False):
        if path.name == "train-00002.parquet":
            raise Killed
        remove(path, missing_ok)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "unlink", unlink)
        extraction(num_crops=2, overwrite=True)
    assert "rows" not in json.loads((codes / "codes.json").read_text())  # no training takes it for complete
    for settings, message in (({}, "was changed"), ({"num_crops": 2}, "num_crops 1, not 2")):
        with pytest.raises(ValueError, match=message):
            extraction(**settings)
    assert extraction(num_crops=2, overwrite=True) == 6
    assert all(len(grids) == 2 for grids in codes_of(codes)["codes"])


def test_codes_of_unknown_input_are_read_but_not_gone_on_with(extraction, tmp_path):
    extraction()
    (tmp_path / "codes" / ".inputs.json").unlink()
    with pytest.raises(ValueError, match="does not say what it was made from.*start over with --overwrite"):
        extraction()
    (tmp_path / "codes" / "codes.json").unlink()
    for overwrite in (False, True):  # shards without a record may be anybody's
        with pytest.raises(ValueError, match="holds files of something else"):
            extraction(overwrite=overwrite)
    assert len(codes_of(tmp_path / "codes")) == 6


def test_extraction_takes_a_pipeline_or_the_shipped_checkpoint(extraction, tmp_path):
    build_class_pipeline().save_pretrained(tmp_path / "pipeline")
    extraction(tokenizer=str(tmp_path / "pipeline"))
    assert extraction() == 6  # its tokenizer is the same
    assert extraction(tokenizer="emoji", overwrite=True) == 6


# Preparation


def test_a_filter_of_other_rows_is_refused_or_begun_anew(tmp_path):
    def write(scores):
        rows = [{"URL": f"http://a.example/{score}", "aesthetic": float(score)} for score in scores]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")

    config = FilterConfig(str(tmp_path / "rows.parquet"), str(tmp_path / "out"), rows_per_shard=2, target_count=4)
    write(range(9))
    assert filter_rows(config)["threshold"] == 5
    assert filter_rows(replace(config, dataset=f"{tmp_path}/*.parquet"))["kept"] == 4
    write(range(20, 29))
    with pytest.raises(ValueError, match=r"1 file of the dataset was changed \(rows.parquet\).*--overwrite"):
        filter_rows(config)
    (tmp_path / "out" / "mine.parquet").write_bytes(b"foreign")
    with pytest.raises(ValueError, match="holds files of something else"):
        filter_rows(replace(config, overwrite=True))
    assert (tmp_path / "out" / "mine.parquet").read_bytes() == b"foreign"
    (tmp_path / "out" / "mine.parquet").unlink()
    assert filter_rows(replace(config, overwrite=True))["threshold"] == 25
    assert codes_of(tmp_path / "out")["aesthetic"][:] == [25, 26, 27, 28]


# Evaluation


def draw(pipe, folder, **kwargs):
    sample_images(pipe, SamplingConfig(4, batch_size=2, **kwargs), folder, progress=False)
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_images_of_other_weights_are_refused_or_drawn_anew(tmp_path):
    pipe = build_class_pipeline()
    first = draw(pipe, tmp_path / "out")
    pipe.transformer.lm_head.weight.data.neg_()
    with pytest.raises(ValueError, match="other input: the weights of transformer changed.*--overwrite"):
        draw(pipe, tmp_path / "out")
    second = draw(pipe, tmp_path / "out", overwrite=True)
    assert second != first and second == draw(pipe, tmp_path / "out") == draw(pipe, tmp_path / "fresh")
    (tmp_path / "out" / ".inputs.json").unlink()
    with pytest.raises(ValueError, match="does not say what it was made from"):
        draw(pipe, tmp_path / "out")
    draw(pipe, tmp_path / "out", overwrite=True, seed=4)


def test_what_is_no_evaluation_is_never_removed(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not empty and holds no images that were generated"):
        draw(build_class_pipeline(), tmp_path, overwrite=True)
    assert (tmp_path / "000000.png").read_bytes() == b"mine"


def test_open_images_of_other_shapes_and_palettes_are_others():
    array = np.arange(2 * 4 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 3)
    assert open_images(array).fingerprint() != open_images(array.reshape(2, 8, 4, 3)).fingerprint()
    pictures = [Image.new("P", (4, 2)), Image.new("P", (4, 2)), Image.new("P", (2, 4))]
    pictures[0].putpalette([0, 0, 0])
    pictures[1].putpalette([255, 0, 0])
    pictures[2].putpalette([0, 0, 0])
    assert len({open_images([image]).fingerprint() for image in pictures}) == 3


# Training


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return folder, write_codes(folder)


def test_a_tokenizer_training_on_other_images_is_refused_or_begun_anew(stages, tmp_path, caplog):
    folder, data = stages
    shapes = shutil.copytree(folder / "shapes", tmp_path / "shapes")
    data = replace(data, dataset=str(shapes))
    config = tokenizer_config(tmp_path / "run", max_train_steps=2)
    train_tokenizer(data, config)
    shapes = shapes.rename(tmp_path / "moved")
    data = replace(data, dataset=str(shapes))
    longer = replace(config, max_train_steps=3)
    train_tokenizer(data, longer)  # goes on
    parts = [shapes / f"train-{part:05d}-of-00002.parquet" for part in (0, 1)]
    parts[0].rename(tmp_path / "spare")
    parts[1].rename(parts[0])
    (tmp_path / "spare").rename(parts[1])
    with pytest.raises(ValueError, match="2 files of the dataset were changed .*train-00000.*--overwrite"):
        train_tokenizer(data, replace(config, max_train_steps=4))  # as many rows as before
    with pytest.raises(ValueError, match="the setting train_split changed"):
        train_tokenizer(replace(data, train_split="test"), replace(config, max_train_steps=4))
    (tmp_path / "run" / "mine.txt").write_text("foreign")
    train_tokenizer(data, replace(config, max_train_steps=1, overwrite=True))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-00000001.png"]
    assert {json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()} == {1}
    assert (tmp_path / "run" / "mine.txt").is_file()

    (tmp_path / "run" / ".inputs.json").unlink()  # as an earlier version left it
    train_tokenizer(data, config)
    assert "does not say what it was made from; it is taken to be what is read now" in caplog.text
    assert (tmp_path / "run" / ".inputs.json").is_file()


def test_a_generator_training_on_other_codes_or_weights_is_refused_or_begun_anew(stages, tmp_path):
    folder, _ = stages
    codes = shutil.copytree(folder / "codes", tmp_path / "codes", copy_function=shutil.copyfile)
    start = generator_config(tmp_path / "start", folder / "tokenizer", codes, max_train_steps=1, conditioning="class")
    train_generator(start)
    config = replace(start, output_dir=str(tmp_path / "run"), init_from=str(tmp_path / "start"))
    train_generator(config)
    again = replace(config, max_train_steps=2, codes_dir=str(folder / "codes"))
    train_generator(again)  # the same codes
    train_generator(replace(start, overwrite=True, seed=1))
    with pytest.raises(ValueError, match="run was made from other input: the weights of init_from changed"):
        train_generator(replace(again, max_train_steps=3))
    shard = codes / "train-00000.parquet"
    rows = datasets.Dataset.from_parquet(str(shard))
    rows.select(reversed(range(len(rows)))).to_parquet(shard)
    with pytest.raises(ValueError, match=r"1 file of the codes was changed \(train-00000.parquet\)"):
        train_generator(replace(start, seed=1, max_train_steps=2))
    train_generator(replace(config, codes_dir=str(codes), overwrite=True))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_run_that_starts_over_holds_nothing_of_the_old_one(stages, tmp_path, monkeypatch):
    """Stopped at its first step: neither the old pipeline nor its checkpoints are there to be taken for it."""
    folder, _ = stages
    config = generator_config(tmp_path / "run", folder / "tokenizer", folder / "codes", max_train_steps=1)
    train_generator(config)
    (tmp_path / "run" / "mine").mkdir()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("llamagen_hf.llamagen.training.generator_trainer.GeneratorTraining.train_step", stop)
        train_generator(replace(config, overwrite=True, conditioning="class"))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"mine", "checkpoints", "samples", ".inputs.json"}
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_recipe_that_is_wrong_removes_nothing(stages, tmp_path):
    folder, _ = stages
    config = generator_config(tmp_path / "run", folder / "tokenizer", folder / "codes", max_train_steps=1)
    train_generator(config)
    with pytest.raises(ValueError, match="do not fill one batch"):
        train_generator(replace(config, overwrite=True, batch_size=1000, micro_batch_size=1))
    assert (tmp_path / "run" / "model_index.json").is_file()
    assert any((tmp_path / "run" / "checkpoints").iterdir())


def test_memory_that_runs_out_does_not_start_over_twice(stages, tmp_path, monkeypatch):
    _, data = stages
    config = tokenizer_config(tmp_path / "run", max_train_steps=1, auto_micro_batch_size=True, checkpointing_steps=1)
    train_tokenizer(data, config)
    step, seen = TokenizerTraining.train_step, []

    def limited(self, micro_batches):
        seen.append(self.training.step)
        if len(micro_batches) == 1 and self.training.step == 2:
            raise RuntimeError("CUDA out of memory.")
        return step(self, micro_batches)

    monkeypatch.setattr(TokenizerTraining, "train_step", limited)
    train_tokenizer(data, replace(config, max_train_steps=4, overwrite=True))
    assert seen == [0, 1, 2, 2, 3]
