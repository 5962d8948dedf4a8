"""Trainings go on with the same input, refuse another one, and start over on demand."""

import json
import shutil
from dataclasses import replace

import pytest


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_training import generator_config, tokenizer_config, write_codes  # noqa: E402

from llamagen_hf.llamagen.training.generator_trainer import train_generator  # noqa: E402
from llamagen_hf.llamagen.training.vq_trainer import VQTask, train_tokenizer  # noqa: E402


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
        patched.setattr("llamagen_hf.llamagen.training.generator_trainer.GeneratorTask.train_step", stop)
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
    step, seen = VQTask.train_step, []

    def limited(self, micro_batches):
        seen.append(self.trainer.step)
        if len(micro_batches) == 1 and self.trainer.step == 2:
            raise RuntimeError("CUDA out of memory.")
        return step(self, micro_batches)

    monkeypatch.setattr(VQTask, "train_step", limited)
    train_tokenizer(data, replace(config, max_train_steps=4, overwrite=True))
    assert seen == [0, 1, 2, 2, 3]
