"""The files for `accelerate launch --config_file`, read as the launcher reads them."""

from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny import build_transformer
from torch.distributed.fsdp import StateDictType


CONFIGS = Path(__file__).parents[2] / "pipelines" / "accelerate_configs"


def launched_with(name: str):
    """The launcher's settings once it has read a file."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "train.py"])
    return _validate_launch_command(args)[0]


@pytest.mark.parametrize(
    "name, num_processes, kind", [("single_gpu", 1, None), ("multi_gpu", 8, "multi_gpu"), ("fsdp2", 8, "use_fsdp")]
)
def test_every_file_starts_what_it_is_named_for(name, num_processes, kind):
    args = launched_with(name)
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (num_processes, 1, "bf16")
    assert [flag for flag in ("multi_gpu", "use_fsdp", "use_deepspeed", "tpu") if getattr(args, flag)] == (
        [kind] if kind else []
    )


def test_there_is_a_test_of_every_file():
    assert {path.stem for path in CONFIGS.glob("*")} == {"single_gpu", "multi_gpu", "fsdp2"}


def test_fsdp_shards_each_layer(monkeypatch):
    for name, value in prepare_multi_gpu_env(launched_with("fsdp2")).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()  # as every launched process makes it
    assert plugin.fsdp_version == 2
    assert plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading
    model = build_transformer()
    is_wrapped = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [module for module in model.modules() if is_wrapped(module)] == list(model.model.layers)
