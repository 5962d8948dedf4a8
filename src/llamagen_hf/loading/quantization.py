"""Weights in fewer bits by torchao (the extra `quantization`): its modes, what is saved, and what images say of it."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn


TORCHAO = "torchao"
# Names of modes that run on every device, and the classes of torchao.quantization that they stand for.
MODES = {
    "int8": "Int8WeightOnlyConfig",
    "int8-dynamic": "Int8DynamicActivationInt8WeightConfig",
    "float8": "Float8WeightOnlyConfig",
}
PROBE_SIZE = 256  # width of a layer that every group size of torchao divides
# torchao would set global options of torch, which change what other models in the process compute.
OWN_OPTIONS = {"set_inductor_config": False}


def quantize_components(modes: dict[str, str]) -> PipelineQuantizationConfig:
    """What `from_pretrained` of a pipeline takes as `quantization_config`, by names of modes.

    Args:
        modes (`dict[str, str]`): The mode of each component, such as `{"transformer": "int8"}`. `"int8"` and
            `"float8"` are types of the weights of linear layers; `"int8-dynamic"` also rounds what goes into them.

    Raises:
        ValueError: If there is no such mode, or if torchao is not installed.
    """
    for mode in modes.values():
        if mode not in MODES:
            *others, last = map(repr, MODES)
            raise ValueError(f"The quantization is {mode!r}; expected {', '.join(others)} or {last}.")
    require_torchao("Quantization")
    from transformers import TorchAoConfig

    # diffusers' models take transformers' class too, but not the other way round.
    return PipelineQuantizationConfig(
        quant_mapping={name: TorchAoConfig(torchao_config(mode)) for name, mode in modes.items()}
    )


def torchao_config(mode: str):
    """The configuration object of torchao that a mode stands for."""
    import torchao.quantization

    return getattr(torchao.quantization, MODES[mode])(**OWN_OPTIONS)


def require_torchao(what: str) -> None:
    """Raise a `ValueError` if torchao is not installed, which `what` needs."""
    if find_spec(TORCHAO) is None:
        raise ValueError(f"{what} needs torchao: `pip install llamagen-hf[quantization]`.")


def check_quantization(folder: Path, arguments: dict[str, Any]) -> None:
    """Check that a checkpoint can be loaded as it was saved, or as it is to be quantized.

    Args:
        folder (`Path`): The checkpoint's folder.
        arguments (`dict`): Those of `from_pretrained`.

    Raises:
        ValueError: If it was quantized by torchao, which is not installed, if it is to be quantized twice, or if a
            mode does not run on the device.
    """
    saved_ones = saved_quantizations(folder)
    for name, saved in saved_ones.items():
        if name not in arguments and saved.get("quant_method") == TORCHAO:
            require_torchao(f"The {name} of this checkpoint is quantized, which")
    given = arguments.get("quantization_config")
    mapping = given.quant_mapping if isinstance(given, PipelineQuantizationConfig) else None
    place = arguments.get("device_map")
    dtypes = arguments.get("dtype") or torch.float32
    for name, config in (mapping or {}).items():
        if name in saved_ones:
            raise ValueError(f"The {name} of this checkpoint is quantized already; load it without a quantization.")
        if config.quant_method == TORCHAO:
            dtype = dtypes.get(name, dtypes.get("default", torch.float32)) if isinstance(dtypes, dict) else dtypes
            try_out(config.quant_type, "cpu" if place in (None, "balanced") else str(place), dtype)


def try_out(quant_type, device: str, dtype: torch.dtype) -> None:
    """Raise a `ValueError` unless a linear layer can be quantized and runs."""
    from torchao.quantization import quantize_

    layer = nn.Linear(PROBE_SIZE, PROBE_SIZE, bias=False, device=device, dtype=dtype)
    try:
        with torch.no_grad():
            quantize_(layer, quant_type)
            layer(torch.zeros(2, PROBE_SIZE, device=device, dtype=dtype))
    except Exception as error:  # torchao's checks and kernels raise errors of many kinds
        name, reason = type(quant_type).__name__, str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"{name} of torchao does not run on {device!r} in {str(dtype)[6:]}: {reason}.") from error


def saved_quantizations(folder: Path) -> dict[str, dict]:
    """How the components of a saved pipeline were quantized, by their names, as their configurations say."""
    found = {}
    for path in sorted(folder.glob("*/config.json")):
        saved = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
        if saved is not None:
            found[path.parent.name] = saved
    return found


def describe_quantization(pipe: DiffusionPipeline) -> dict[str, dict[str, str]]:
    """What the parameters of images say about the quantization of a pipeline's models; nothing if there is none.

    Returns:
        `dict`: `{"quantization": {"transformer": "int8"}}`, for instance. Other configurations of torchao are written
        out, and other libraries are named.
    """
    names = {}
    for name, component in pipe.components.items():
        config = getattr(component.config, "quantization_config", None) if isinstance(component, nn.Module) else None
        if config is not None:
            names[name] = quantization_name(config)
    return {"quantization": names} if names else {}


def check_same_quantization(pipe: DiffusionPipeline, parameters: dict) -> None:
    """Raise a `ValueError` if an image was not drawn with the quantization that a pipeline has."""
    own, theirs = (each.get("quantization", {}) for each in (describe_quantization(pipe), parameters))
    if theirs != own:
        raise ValueError(
            f"The image was drawn with the quantization {theirs or 'none'}, the pipeline has {own or 'none'}."
        )


def quantization_name(config) -> str:
    """The name of a mode for a configuration of transformers or diffusers, or else all that determines it."""
    given = config if isinstance(config, dict) else config.to_dict()
    if given["quant_method"] != TORCHAO:
        return str(getattr(given["quant_method"], "value", given["quant_method"]))
    require_torchao("A quantized model")
    from torchao.core.config import config_to_dict

    kind, left_out = given["quant_type"]["default"], given.get("modules_to_not_convert")
    values = {name: value for name, value in kind["_data"].items() if name not in OWN_OPTIONS}
    for mode, name in MODES.items():
        own = config_to_dict(torchao_config(mode))["_data"]
        if name == kind["_type"] and not left_out and values == {key: own[key] for key in values}:
            return mode
    written = ", ".join(f"{name}={json.dumps(value)}" for name, value in values.items())
    return f"{kind['_type']}({written})" + (f" without {', '.join(left_out)}" if left_out else "")


def quantized_names(keys: set[str], metadata: dict[str, str] | None) -> set[str]:
    """Names of the quantized weights that a file of safetensors holds whole.

    torchao stores a weight as several tensors, and its name in the header of the file.

    Args:
        keys (`set[str]`): The names of the file's tensors.
        metadata (`dict[str, str]`, *optional*): Its header.
    """
    found = set()
    for name in json.loads((metadata or {}).get("tensor_names", "[]")):
        module, _, parameter = name.rpartition(".")
        parts = json.loads(metadata[name]).get("_tensor_data_names", [])
        if parts and keys >= {f"{module}._{parameter}_{part}" for part in parts}:
            found.add(name)
    return found
