"""`llamagen info`."""

import json
from math import prod
from pathlib import Path

import typer

from .app import Checkpoint, app, one_sentence_errors


@app.command()
def info(checkpoint: Checkpoint = None):
    """Print what a checkpoint is: sizes, parameters, conditioning, classes; of a cascade, each part."""
    with one_sentence_errors():
        from llamagen_hf.loading.checkpoint import CheckpointLoaderMixin, is_shipped

        folder = CheckpointLoaderMixin.find_checkpoint(checkpoint)
        shown = f"{checkpoint or 'emoji'}, shipped with llamagen" if is_shipped(checkpoint) else checkpoint
        facts = {"checkpoint": shown} | describe(folder)
        width = max(14, max(map(len, facts)) + 2)
        for name, value in facts.items():
            typer.echo(f"{name + ':':{width}}{value}")


def describe(folder: Path) -> dict[str, str]:
    """What the checkpoint in a folder is, by name, in the order to show it.

    Raises:
        OSError: If the folder holds none.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(f"{str(folder)!r} is no checkpoint: it has no model_index.json that can be read.") from error
    kind = index["_class_name"]
    if kind == "CascadePipeline":
        facts = {"cascade": "the base generates small images, the upsampler enlarges them"}
        for part in ("base", "upsampler"):
            facts |= {f"{part}'s {name}": value for name, value in describe(folder / part).items()}
        return facts
    known = {"AutoregressiveImagePipeline": describe_autoregressive, "PixelDiffusionPipeline": describe_diffusion}
    facts = known[kind](folder, index) if kind in known else {"pipeline": f"{kind} of diffusers"}
    facts["parameters"] = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in count_parameters(folder).items())
    if kind in known:
        defaults = index.get("sampling_defaults") or {}
        facts["sampling"] = ", ".join(f"{name} {value}" for name, value in defaults.items()) or "as the library's"
    return facts


def describe_autoregressive(folder: Path, index: dict) -> dict[str, str]:
    """What [`describe`] says about LlamaGen's images, codes and conditions."""
    from llamagen_hf import LlamaGenConfig, LlamaGenVQModel

    config = LlamaGenConfig.from_pretrained(folder / "transformer")
    vq = LlamaGenVQModel.load_config(folder / "vq_model")
    side = config.grid_size * 2 ** (len(vq["block_out_channels"]) - 1)
    facts = {
        "image": f"{side}x{side} pixels from {config.grid_size}x{config.grid_size} codes",
        "codes": f"{vq['num_vq_embeddings']} of width {vq['vq_embed_dim']}",
        "generator": f"{config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"{config.num_attention_heads} heads",
        "conditioning": f"text, {config.condition_length} positions of width {config.condition_dim}, prompts "
        f"cleaned by {config.prompt_cleaning} rules"
        if config.conditioning == "text"
        else f"class, {config.num_classes} classes",
    }
    if config.id2label:
        shown = [f"{index} {name}" for index, name in list(config.id2label.items())[:5]]
        facts["classes"] = ", ".join(shown) + (", ..." if len(config.id2label) > 5 else "")
    return facts


def describe_diffusion(folder: Path, index: dict) -> dict[str, str]:
    """What [`describe`] says about a pixel diffusion pipeline, by the configuration of its U-Net."""
    import torch
    from diffusers import UNet2DConditionModel

    from llamagen_hf.diffusion.unet import condition_dim, image_size, patch_size, upsamples

    with torch.device("meta"):  # without weights
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    side, dim = image_size(unet), condition_dim(unet)
    made = "enlarged from smaller images" if upsamples(unet) else "from noise"
    channels = ", ".join(map(str, unet.config.block_out_channels))
    return {
        "image": f"{side}x{side} pixels, {made}",
        "generator": f"U-Net of {channels} channels, patches of {patch_size(unet)}x{patch_size(unet)} pixels",
        "scheduler": index["scheduler"][1],
        "conditioning": "none" if dim is None else f"text, {index['condition_length']} positions of width {dim}",
    }


def count_parameters(folder: Path) -> dict[str, int]:
    """The number of weights of each component."""
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            count = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
        counts[path.parent.name] = counts.get(path.parent.name, 0) + count
    return counts
