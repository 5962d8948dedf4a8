"""Two processes on one CPU (gloo): the same training as with one, and sharded weights."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from safetensors.torch import load_file
from tiny import build_text_encoder, build_transformer
from tiny_clip import clip_config
from tiny_diffusion import build_unet
from tiny_diffusion_training import classifier_config, diffusion_config
from tiny_training import generator_config, tokenizer_config, write_codes
from transformers import ByT5Tokenizer


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf import AutoregressiveImagePipeline, PixelDiffusionPipeline  # noqa: E402
from llamagen_hf.autoencoders import load_vq_model  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.diffusion.schedules import sampling_scheduler  # noqa: E402
from llamagen_hf.diffusion.training.classifier_trainer import train_classifier  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_trainer import train_diffusion  # noqa: E402
from llamagen_hf.llamagen.training.generator_trainer import train_generator  # noqa: E402
from llamagen_hf.llamagen.training.vq_trainer import train_tokenizer  # noqa: E402
from llamagen_hf.unclip.training.clip_trainer import train_clip  # noqa: E402


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return folder, write_codes(folder)


@pytest.fixture(scope="module")
def without_dropout(stages):
    """A text-conditional pipeline whose text encoder, too, can learn in two processes as in one.

    Its weights are large: where gradients are no more than rounding errors, Adam makes steps of them all the same.
    """
    folder, _ = stages
    text_encoder = build_text_encoder()
    text_encoder.config.dropout_rate = 0.0
    transformer = build_transformer(conditioning="text", vocab_size=32, grid_size=8)
    for name in ("embedding", "residual", "ffn"):
        setattr(transformer.config, f"{name}_dropout", 0.0)
    pipe = AutoregressiveImagePipeline(load_vq_model(folder / "tokenizer"), transformer, text_encoder, ByT5Tokenizer())
    pipe.save_pretrained(folder / "start")
    return str(folder / "start")


def launch_stage(tmp_path, stage, recipe) -> dict:
    """Run a stage in two processes and return its report."""
    path = tmp_path / f"{stage}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    result = launch(ROOT / "pipelines" / f"{stage}.py", "--config", path)
    assert "2 process(es), the first one on cpu" in result.stderr
    return json.loads(result.stdout[result.stdout.index("{") :])


def logged(folder: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


# Dropout differs between processes, and so would its losses.
EXACT = {"max_train_steps": 8, "batch_size": 4, "log_steps": 1, "eval_steps": 4, "sample_steps": 8}


@pytest.mark.parametrize("conditioning, learns", [("class", False), ("text", False), ("text", True)])
def test_two_processes_train_a_generator_like_one(stages, without_dropout, tmp_path, conditioning, learns):
    folder, _ = stages
    config = {"conditioning": conditioning, "dropout": 0.0, "condition_dropout": 0.0, **EXACT}
    if learns:
        config |= {"init_from": without_dropout, "train_text_encoder": True}
    elif conditioning == "text":  # a new T5 encoder would have dropout of its own
        build_text_encoder().save_pretrained(tmp_path / "encoder")
        ByT5Tokenizer().save_pretrained(tmp_path / "encoder")
        config["text_encoder"] = str(tmp_path / "encoder")
    one, two = (
        generator_config(tmp_path / name, folder / "tokenizer", folder / "codes", **config) for name in ("one", "two")
    )
    metrics = train_generator(one)
    report = launch_stage(tmp_path, "train_generator", {"generator": vars(two)})
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
    report = launch_stage(tmp_path, "train_tokenizer", {"data": vars(data), "vq_model": vars(two)})
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
    assert launch_stage(tmp_path, "train_tokenizer", {"data": vars(data), "vq_model": vars(config)})["test_psnr"] > 0


@pytest.mark.parametrize("kind", ["base", "upsampler"])
def test_two_processes_train_a_diffusion_model_like_one(stages, tmp_path, kind):
    """Noise, levels, windows and dropped prompts are drawn for a row, whichever process reads it."""
    folder, data = stages
    if kind == "upsampler":
        config = {"conditioning": "none", "low_image_size": 8, "crop_size": 8, "random_flip": True}
        config["low_vq_model"] = str(folder / "tokenizer")
    else:  # a new T5 encoder would have dropout of its own, which differs between processes
        build_text_encoder().save_pretrained(tmp_path / "encoder")
        ByT5Tokenizer().save_pretrained(tmp_path / "encoder")
        config = {"text_encoder": str(tmp_path / "encoder"), "condition_dropout": 0.3}
    # Groups of several channels, or the norms would take the biases before them out again.
    config |= {"block_out_channels": [8, 12], "attention_head_dim": 4}
    one, two = (diffusion_config(tmp_path / name, **config, **EXACT) for name in ("one", "two"))
    metrics = train_diffusion(data, one)
    report = launch_stage(tmp_path, "train_diffusion", {"data": vars(data), "diffusion": vars(two)})
    assert report == pytest.approx(metrics, rel=1e-3)
    losses = logged(tmp_path / "one", "loss")
    assert len(losses) == 8 and losses == pytest.approx(logged(tmp_path / "two", "loss"), abs=1e-5)
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    weights = [load_file(tmp_path / name / file) for name in ("one", "two")]
    for key, value in weights[0].items():
        # A softmax takes these out again; their gradients are rounding errors, of which Adam makes steps.
        if not key.endswith(("k_proj.bias", "to_k.bias")):
            torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-4, msg=key)


def test_two_processes_train_a_classifier_like_one(stages, tmp_path):
    _, data = stages
    one, two = (
        classifier_config(tmp_path / name, block_out_channels=[8, 12], attention_head_dim=4, **EXACT)
        for name in ("one", "two")
    )
    metrics = train_classifier(data, one)
    report = launch_stage(tmp_path, "train_classifier", {"data": vars(data), "classifier": vars(two)})
    assert report == pytest.approx(metrics, rel=1e-3)
    losses = logged(tmp_path / "one", "loss")
    assert len(losses) == 8 and losses == pytest.approx(logged(tmp_path / "two", "loss"), abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_two_processes_train_a_clip_like_one(stages, tmp_path, micro_batch_size):
    """Each compares its rows with those of the other."""
    _, data = stages
    settings = EXACT | {"batch_size": 8, "eval_steps": 8, "crop": "random"}
    one, two = (clip_config(tmp_path / name, **settings) for name in ("one", "two"))
    two.micro_batch_size = micro_batch_size
    metrics = train_clip(data, one)
    report = launch_stage(tmp_path, "train_clip", {"data": vars(data), "clip": vars(two)})
    assert report == pytest.approx(metrics, abs=1e-5)
    for name in ("loss", "logit_scale"):
        assert logged(tmp_path / "one", name) == pytest.approx(logged(tmp_path / "two", name), abs=1e-5), name
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for key, value in weights[0].items():
        if not key.endswith("k_proj.bias"):  # a softmax takes these out again; Adam makes steps of rounding errors
            torch.testing.assert_close(value, weights[1][key], rtol=0, atol=1e-5, msg=key)


PRETRAIN = """
import sys, torch
from accelerate.utils import set_seed
from tiny import build_text_encoder, build_vq_model
from transformers import T5EncoderModel
from llamagen_hf.processes import leave_processes, this_process
from llamagen_hf.training.text_encoder import pretrain_text_encoder

process = this_process()
generator = torch.Generator().manual_seed(0)
whole = [
    {
        "codes": torch.randint(64, (4, 16), generator=generator),
        "input_ids": torch.randint(1, 384, (4, 8), generator=generator),
        "attention_mask": torch.ones(4, 8, dtype=torch.long),
    }
    for _ in range(5)
]
mine = slice(process.process_index, None, process.num_processes)
parts = [{key: value[mine] for key, value in batch.items()} for batch in whole]
config = build_text_encoder().config
config.dropout_rate = 0.0
set_seed(0)
text_encoder = T5EncoderModel(config)
vq_model = build_vq_model()
pretrain_text_encoder(text_encoder, parts, lambda batch: vq_model.lookup(batch["codes"]).flatten(1), 5, 1e-2)
torch.save(text_encoder.state_dict(), f"{sys.argv[1]}-{process.process_index}")
leave_processes()
"""


def test_two_processes_teach_one_text_encoder(tmp_path):
    """What each of them has afterwards is what one has that saw all rows."""
    script = tmp_path / "pretrain.py"
    script.write_text(PRETRAIN)
    launch(script, tmp_path / "one", processes=1)
    launch(script, tmp_path / "two")
    expected = torch.load(tmp_path / "one-0")
    for name in ("two-0", "two-1"):
        for key, value in torch.load(tmp_path / name).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-5, msg=key)


FILTER = """
import sys
from llamagen_hf.data.filtering import FilterConfig, filter_rows
from llamagen_hf.processes import leave_processes, this_process

process = this_process()
report = filter_rows(FilterConfig(*sys.argv[1:3], valid_url=False, min_side=18, width_column="w", height_column="w"))
assert report["kept"] == 3, report
leave_processes()
"""


def test_two_processes_filter_once(tmp_path):
    rows = datasets.Dataset.from_dict({"w": range(1, 21)})
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "filter.py").write_text(FILTER)
    launch(tmp_path / "filter.py", tmp_path / "rows.parquet", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["train-00000.parquet"]


# Accelerate shards on accelerators only, though torch can on CPUs too: this takes two CPUs for accelerators.
SHARD_ON_CPUS = """
import json, os, sys
os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
               "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaGenDecoderLayer", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
from accelerate import PartialState
from accelerate.utils import DistributedType
from llamagen_hf.processes import leave_processes, this_process
process = this_process()
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
from llamagen_hf.llamagen.training.generator_trainer import train_generator
from llamagen_hf.llamagen.training.generator_config import GeneratorTrainingConfig
report = train_generator(GeneratorTrainingConfig(**json.loads(sys.argv[1])))
if process.is_main_process:
    print(json.dumps(report))
leave_processes()
"""


@pytest.mark.parametrize("kind", ["class", "text", "lora"])
def test_sharded_weights_load_in_one_process(stages, without_dropout, tmp_path, kind):
    """FSDP2 over gloo: stopped, resumed, and saved whole, the text encoder that learns along included."""
    folder, _ = stages
    config = {"conditioning": "class", "ema_decay": 0.0, "dropout": 0.0, "condition_dropout": 0.0, **EXACT}
    config["lr_scheduler"] = "constant"  # a shorter run is then the beginning of a longer one
    if kind != "class":
        config |= {"conditioning": "text", "init_from": without_dropout}
        config |= {"train_text_encoder": True} if kind == "text" else {"lora_rank": 2}
    metrics = train_generator(generator_config(tmp_path / "one", folder / "tokenizer", folder / "codes", **config))
    script = tmp_path / "shard.py"
    script.write_text(SHARD_ON_CPUS)
    sharded = generator_config(tmp_path / "two", folder / "tokenizer", folder / "codes", **config)
    for steps in (3, 8):
        result = launch(script, json.dumps(vars(sharded) | {"max_train_steps": steps}))
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == pytest.approx(metrics, abs=1e-4)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("**/*.safetensors")]
    files = [file for file in files if file.parts[0] != "checkpoints"]
    assert len(files) == {"class": 2, "text": 3, "lora": 1}[kind]
    for file in files:
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4, msg=f"{file}: {key}")
    if kind == "lora":
        pipe = AutoregressiveImagePipeline.from_pretrained(without_dropout)
        pipe.load_lora_weights(tmp_path / "two")
    else:
        pipe = AutoregressiveImagePipeline.from_pretrained(tmp_path / "two")
    condition = {"class_labels": "square"} if kind == "class" else {"prompt": "a red square"}
    assert pipe(**condition).images[0].size == (16, 16)


@pytest.mark.parametrize("kind", ["text", "lora"])
def test_sharded_diffusion_weights_load_in_one_process(stages, tmp_path, kind):
    """The same for U-Nets, which are sharded by their residual blocks."""
    _, data = stages
    text_encoder = build_text_encoder()
    text_encoder.config.dropout_rate = 0.0
    unet = build_unet(condition_dim=16, block_out_channels=(8, 12), attention_head_dim=4)
    start = PixelDiffusionPipeline(unet, sampling_scheduler(), text_encoder, ByT5Tokenizer(), condition_length=12)
    start.save_pretrained(tmp_path / "start")
    config = {"init_from": str(tmp_path / "start"), "ema_decay": 0.0, "lr_scheduler": "constant", **EXACT}
    config |= {"train_text_encoder": True} if kind == "text" else {"lora_rank": 2}
    one, two = (diffusion_config(tmp_path / name, **config) for name in ("one", "two"))
    metrics = train_diffusion(data, one)
    script = tmp_path / "shard.py"
    script.write_text(
        SHARD_ON_CPUS.partition("from llamagen_hf.llamagen.training.generator_trainer import")[0].replace(
            "LlamaGenDecoderLayer", "ResnetBlock2D"
        )
        + "from llamagen_hf.data.source import DataConfig\n"
        "from llamagen_hf.diffusion.training.diffusion_config import DiffusionTrainingConfig\n"
        "from llamagen_hf.diffusion.training.diffusion_trainer import train_diffusion\n"
        "data, config = json.loads(sys.argv[1])\n"
        "report = train_diffusion(DataConfig(**data), DiffusionTrainingConfig(**config))\n"
        "if process.is_main_process:\n    print(json.dumps(report))\n"
        "leave_processes()\n"
    )
    for steps in (3, 8):
        result = launch(script, json.dumps([vars(data), vars(two) | {"max_train_steps": steps}]))
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(metrics, abs=1e-4)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("**/*.safetensors")]
    files = [file for file in files if file.parts[0] != "checkpoints"]
    assert len(files) == {"text": 2, "lora": 1}[kind]
    for file in files:
        weights = [load_file(tmp_path / name / file) for name in ("one", "two")]
        assert weights[0].keys() == weights[1].keys()
        for key, value in weights[0].items():
            if not key.endswith(("k_proj.bias", "to_k.bias")):
                torch.testing.assert_close(weights[1][key], value, rtol=0, atol=1e-4, msg=f"{file}: {key}")
    pipe = PixelDiffusionPipeline.from_pretrained(tmp_path / ("two" if kind == "text" else "start"))
    if kind == "lora":
        pipe.load_lora_weights(tmp_path / "two")
    assert pipe("a red square", num_inference_steps=2).images[0].size == (16, 16)


def test_a_sharded_tokenizer_is_refused_in_words(stages, tmp_path):
    _, data = stages
    script = tmp_path / "shard.py"
    script.write_text(
        SHARD_ON_CPUS.partition("from llamagen_hf.llamagen.training.generator_trainer import")[0]
        + "from llamagen_hf.data.source import DataConfig\n"
        "from llamagen_hf.llamagen.training.vq_trainer import train_tokenizer\n"
        "from llamagen_hf.llamagen.training.vq_config import TokenizerTrainingConfig\n"
        "data, config = json.loads(sys.argv[1])\n"
        "try:\n    train_tokenizer(DataConfig(**data), TokenizerTrainingConfig(**config))\n"
        'except ValueError as error:\n    assert "A tokenizer can\'t be sharded" in str(error)\n'
        "else:\n    raise AssertionError\n"
        "leave_processes()\n"
    )
    launch(script, json.dumps([vars(data), vars(tokenizer_config(tmp_path / "out", ema_decay=0.0))]))
