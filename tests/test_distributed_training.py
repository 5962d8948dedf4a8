"""Two processes on one CPU (gloo): the same training as with one, and sharded weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_text_encoder
from tiny_training import generator_config, tokenizer_config, write_codes
from transformers import ByT5Tokenizer


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf import AutoregressiveImagePipeline  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.training.generator import train_generator  # noqa: E402
from llamagen_hf.training.tokenizer import train_tokenizer  # noqa: E402


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return folder, write_codes(folder)


def launch(tmp_path, stage, recipe, *flags) -> dict:
    """Run a stage in two processes and return its report."""
    path = tmp_path / f"{stage}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
               "--num_cpu_threads_per_process", "1", "--main_process_port", "0", *flags]  # fmt: skip
    result = subprocess.run(
        [*command, ROOT / "pipelines" / f"{stage}.py", "--config", path], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout[result.stdout.index("{") :])


def logged(folder: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


# Dropout differs between processes, and so would its losses.
EXACT = {"max_train_steps": 8, "batch_size": 4, "log_steps": 1, "eval_steps": 4, "sample_steps": 8}


@pytest.mark.parametrize("conditioning", ["class", "text"])
def test_two_processes_train_a_generator_like_one(stages, tmp_path, conditioning):
    folder, _ = stages
    config = {"conditioning": conditioning, "dropout": 0.0, "condition_dropout": 0.0, **EXACT}
    if conditioning == "text":  # a new T5 encoder would have dropout of its own
        build_text_encoder().save_pretrained(tmp_path / "encoder")
        ByT5Tokenizer().save_pretrained(tmp_path / "encoder")
        config["text_encoder"] = str(tmp_path / "encoder")
    one, two = (
        generator_config(tmp_path / name, folder / "tokenizer", folder / "codes", **config) for name in ("one", "two")
    )
    metrics = train_generator(one)
    report = launch(tmp_path, "train_generator", {"generator": vars(two)})
    assert report == pytest.approx(metrics, abs=1e-5)
    losses = logged(tmp_path / "one", "loss")
    assert len(losses) == 8 and losses == pytest.approx(logged(tmp_path / "two", "loss"), abs=1e-5)
    weights = [load_file(tmp_path / name / "transformer" / "model.safetensors") for name in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-5, msg=key)


def test_two_processes_train_a_tokenizer_like_one(stages, tmp_path):
    """With a discriminator without batch statistics; codes are not revived, which would depend on the process."""
    _, data = stages
    config = {
        "discriminator": "stylegan", "discriminator_width": 32, "discriminator_start": 2, "revive_until_step": 0,
        **EXACT,
    }  # fmt: skip
    one, two = (tokenizer_config(tmp_path / name, **config) for name in ("one", "two"))
    metrics = train_tokenizer(data, one)
    report = launch(tmp_path, "train_tokenizer", {"data": vars(data), "tokenizer": vars(two)})
    assert report == pytest.approx(metrics, rel=1e-4)
    for name in ("reconstruction", "commitment", "adversarial", "discriminator"):
        assert logged(tmp_path / "one", name) == pytest.approx(logged(tmp_path / "two", name), abs=1e-5), name


def test_a_patchgan_trains_in_two_processes_with_revived_codes(stages, tmp_path):
    _, data = stages
    data = DataConfig(**vars(data) | {"image_size": 32})
    config = tokenizer_config(
        tmp_path / "out", discriminator="patchgan", discriminator_width=8, discriminator_start=1,
        adversarial_weight=0.1, adaptive_adversarial_weight=True, **EXACT,
    )  # fmt: skip
    assert launch(tmp_path, "train_tokenizer", {"data": vars(data), "tokenizer": vars(config)})["test_psnr"] > 0


# Accelerate shards on accelerators only, though torch can on CPUs too: this takes two CPUs for accelerators.
SHARD_ON_CPUS = """
import json, os, sys
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
               "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaGenDecoderLayer", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
from accelerate import PartialState
from accelerate.utils import DistributedType
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
from llamagen_hf.training.generator import train_generator
from llamagen_hf.training.generator_config import GeneratorTrainingConfig
report = train_generator(GeneratorTrainingConfig(**json.loads(sys.argv[1])))
if PartialState().is_main_process:
    print(json.dumps(report))
"""


def test_sharded_weights_load_in_one_process(stages, tmp_path):
    """FSDP2 over gloo: stopped, resumed, and saved whole."""
    folder, _ = stages
    config = {"conditioning": "class", "ema_decay": 0.0, "dropout": 0.0, "condition_dropout": 0.0, **EXACT}
    config["lr_scheduler"] = "constant"  # a shorter run is then the beginning of a longer one
    metrics = train_generator(generator_config(tmp_path / "one", folder / "tokenizer", folder / "codes", **config))
    script = tmp_path / "shard.py"
    script.write_text(SHARD_ON_CPUS)
    sharded = generator_config(tmp_path / "two", folder / "tokenizer", folder / "codes", **config)
    for steps in (3, 8):
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script,
             json.dumps(vars(sharded) | {"max_train_steps": steps})],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-5000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == pytest.approx(metrics, abs=1e-4)
    pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "two")
    expected = AutoregressiveImagePipeline.from_pretrained(tmp_path / "one").transformer.state_dict()
    for key, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-4, msg=key)
    assert pipe(class_labels="square").images[0].size == (16, 16)
