"""Runs that are killed and started again, in processes of their own."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from accelerate import Accelerator  # noqa: E402
from launching import CONTEXT  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny_clip import clip_config  # noqa: E402
from tiny_diffusion_training import classifier_config, diffusion_config  # noqa: E402
from tiny_training import generator_config, tokenizer_config, write_codes  # noqa: E402
from tiny_unclip import prior_config, save_clip  # noqa: E402

from llamagen_hf.diffusion.training.classifier_trainer import train_classifier  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_trainer import train_diffusion  # noqa: E402
from llamagen_hf.llamagen.training.generator_trainer import train_generator  # noqa: E402
from llamagen_hf.llamagen.training.vq_trainer import train_tokenizer  # noqa: E402
from llamagen_hf.training.checkpoints import latest_checkpoint, resume, save_checkpoint  # noqa: E402
from llamagen_hf.unclip.training.clip_trainer import train_clip  # noqa: E402
from llamagen_hf.unclip.training.prior_trainer import train_prior  # noqa: E402


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return folder, write_codes(folder)


def run_forking(function, *configs) -> None:
    """Run `function`, with loader workers that are forked too and need not import everything again."""
    multiprocessing.set_start_method("fork", force=True)
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # 5 s, whenever a stream is left before its end
    function(*configs)


def start(function, *configs) -> multiprocessing.Process:
    process = CONTEXT.Process(target=run_forking, args=(function, *configs))
    process.start()
    return process


def run_through(function, *configs) -> None:
    process = start(function, *configs)
    process.join()
    assert process.exitcode == 0


def run_and_kill(path: Path, function, *configs) -> None:
    """Kill the run as soon as `path` exists."""
    process = start(function, *configs)
    while not path.exists():
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def state_of(folder: Path) -> dict:
    """All that a checkpoint holds, by file."""
    files = {}
    for path in sorted(folder.iterdir()):
        load = load_file if path.suffix == ".safetensors" else lambda path: torch.load(path, weights_only=False)
        files[path.name] = load(path)
    return files


def assert_equal(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif hasattr(one, "dtype"):
        assert (one == other).all(), where
    else:
        assert one == other, where


def check_resume(folder: Path, function, config, *before) -> None:
    """Kill a run twice, once while it writes a checkpoint, and compare its end with that of a run that was not."""
    whole = replace(config, output_dir=str(folder / "whole"))
    killed = replace(config, output_dir=str(folder / "killed"))
    run_through(function, *before, whole)
    checkpoints = folder / "killed" / "checkpoints"
    run_and_kill(checkpoints / "step-00000002", function, *before, killed)
    run_and_kill(checkpoints / "partial-00000006", function, *before, killed)
    run_through(function, *before, killed)
    one, other = (state_of(folder / name / "checkpoints" / "step-00000010") for name in ("whole", "killed"))
    assert {"model.safetensors", "optimizer.bin", "random_states_0.pkl"} <= one.keys()
    assert_equal(one, other)
    results = [sorted(folder.glob(f"{name}/**/*.safetensors")) for name in ("whole", "killed")]
    assert len(results[0]) == len(results[1]) > 0
    for a, b in zip(*results, strict=True):
        assert_equal(load_file(a), load_file(b), a.name)


RUN = {"max_train_steps": 10, "checkpointing_steps": 2, "batch_size": 4, "micro_batch_size": 2}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_generator_run_ends_like_an_unbroken_one(stages, tmp_path, workers):
    folder, _ = stages
    config = generator_config(tmp_path, folder / "tokenizer", folder / "codes", num_workers=workers, **RUN)
    check_resume(tmp_path, train_generator, config)


@pytest.mark.slow
def test_a_killed_clip_run_ends_like_an_unbroken_one(stages, tmp_path):
    _, data = stages
    config = clip_config(tmp_path, crop="random", random_flip=True, num_workers=2, **RUN)
    check_resume(tmp_path, train_clip, config, data)


@pytest.mark.slow
@pytest.mark.parametrize("workers, streaming", [(0, False), (2, False), (0, True), (2, True)])
def test_a_killed_tokenizer_run_ends_like_an_unbroken_one(stages, tmp_path, workers, streaming):
    _, data = stages
    config = tokenizer_config(
        tmp_path, num_workers=workers, crop="random", discriminator="stylegan", discriminator_width=32,
        discriminator_start=3, adaptive_adversarial_weight=True, entropy_weight=0.1, **RUN,
    )  # fmt: skip
    check_resume(tmp_path, train_tokenizer, config, replace(data, streaming=streaming))


@pytest.mark.slow
@pytest.mark.parametrize("workers, streaming", [(0, False), (2, True)])
def test_a_killed_diffusion_run_ends_like_an_unbroken_one(stages, tmp_path, workers, streaming):
    """An upsampler that learns its text encoder along, with all that is drawn at random."""
    folder, data = stages
    config = diffusion_config(
        tmp_path, low_image_size=8, low_vq_model=str(folder / "tokenizer"), crop_size=8, crop="random",
        random_flip=True, text_pretrain_steps=2, num_workers=workers, **RUN,
    )  # fmt: skip
    check_resume(tmp_path, train_diffusion, config, replace(data, streaming=streaming))


@pytest.mark.slow
@pytest.mark.parametrize("kind, streaming", [("diffusion", False), ("autoregressive", True)])
def test_a_killed_prior_run_ends_like_an_unbroken_one(stages, tmp_path, kind, streaming):
    """Mean and deviation, or the quantizer, are measured once, and come back with the checkpoint."""
    _, data = stages
    config = prior_config(tmp_path, clip=str(save_clip(tmp_path / "clip")), kind=kind, dropout=0.1, **RUN)
    check_resume(tmp_path, train_prior, config, replace(data, streaming=streaming))


def test_a_killed_classifier_run_ends_like_an_unbroken_one(stages, tmp_path):
    _, data = stages
    config = classifier_config(tmp_path, crop="random", random_flip=True, dropout=0.1, **RUN)
    check_resume(tmp_path, train_classifier, config, data)


@pytest.mark.parametrize(
    "change, message",
    [({"hidden_size": 32}, "size mismatch"), ({"batch_size": 5}, "its run had batch_size 4, not 5"),
     ({"seed": 1}, "its run had seed 0, not 1")],
)  # fmt: skip
def test_a_checkpoint_of_another_recipe_is_one_sentence(stages, tmp_path, change, message):
    folder, _ = stages
    config = generator_config(tmp_path, folder / "tokenizer", folder / "codes", max_train_steps=1)
    train_generator(config)
    with pytest.raises(ValueError, match=f"step-00000001 belongs to another recipe .*({message}).*another output_dir"):
        train_generator(replace(config, max_train_steps=2, **change))


def test_a_half_written_checkpoint_is_passed_over_and_named(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    save_checkpoint(accelerator, tmp_path, step=3, total_limit=1)
    (tmp_path / "partial-00000006").mkdir()
    assert resume(accelerator, tmp_path) == 3
    assert "Ignoring" in caplog.text and "partial-00000006" in caplog.text


def test_the_only_complete_checkpoint_outlives_one_that_fails(tmp_path):
    accelerator = Accelerator(cpu=True)
    assert resume(accelerator, tmp_path) == 0
    save_checkpoint(accelerator, tmp_path, step=3, total_limit=1)

    class Unsaveable:
        def state_dict(self):
            raise OSError(28, "No space left on device")

        def load_state_dict(self, state):
            pass

    accelerator.register_for_checkpointing(Unsaveable())
    with pytest.raises(
        OSError, match="The checkpoint of step 6 can't be written .* No space left on device.*step-0000000"
    ):
        save_checkpoint(accelerator, tmp_path, step=6, total_limit=1)
    assert latest_checkpoint(tmp_path).name == "step-00000003"


def train_on_a_full_disk(config) -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    try:
        train_generator(config)
    except OSError as error:
        assert "can't be written" in str(error)
        os._exit(7)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_usable(stages, tmp_path):
    folder, _ = stages
    config = generator_config(tmp_path / "run", folder / "tokenizer", folder / "codes", **RUN)
    whole = replace(config, output_dir=str(tmp_path / "whole"))
    run_through(train_generator, whole)
    run_and_kill(tmp_path / "run" / "checkpoints" / "step-00000002", train_generator, config)
    process = start(train_on_a_full_disk, config)
    process.join()
    assert process.exitcode == 7
    checkpoints = tmp_path / "run" / "checkpoints"
    assert latest_checkpoint(checkpoints) is not None
    run_through(train_generator, config)
    assert_equal(
        *(state_of(path / "checkpoints" / "step-00000010") for path in (tmp_path / "run", tmp_path / "whole"))
    )
