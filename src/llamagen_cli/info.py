"""`llamagen info`."""

import json
from math import prod
from pathlib import Path

import typer

from .app import Checkpoint, app, one_sentence_errors


# What a pipeline of pipelines is, and its parts.
WHOLES = {
    "CascadePipeline": (
        ("cascade", "the base generates small images, the upsampler enlarges them"),
        ("base", "upsampler"),
    ),
    "PriorDecoderPipeline": (
        ("prior and decoder", "the prior draws an image's embedding from a prompt, the decoder an image from that"),
        ("prior", "decoder"),
    ),
}


@app.command()
def info(checkpoint: Checkpoint = None):
    """Print what a checkpoint is: sizes, parameters, conditioning, classes; of several parts, each."""
    with one_sentence_errors():
        from llamagen_hf.loading.checkpoint import is_shipped

        folder = find_folder(checkpoint)
        shown = f"{checkpoint or 'emoji'}, shipped with llamagen" if is_shipped(checkpoint) else checkpoint
        facts = {"checkpoint": shown} | describe(folder)
        width = max(14, max(map(len, facts)) + 2)
        for name, value in facts.items():
            typer.echo(f"{name + ':':{width}}{value}")


def find_folder(checkpoint: str | None) -> Path:
    """The folder of a pipeline, or of a CLIP or classifier, which have `config.json` in place of its index."""
    from llamagen_hf.loading.checkpoint import CheckpointLoaderMixin, is_shipped

    if is_shipped(checkpoint):
        return CheckpointLoaderMixin.find_checkpoint(checkpoint)
    folder = Path(checkpoint)
    return folder if folder.is_dir() else Path(CheckpointLoaderMixin.download(checkpoint))


def describe(folder: Path) -> dict[str, str]:
    """What the checkpoint in a folder is, by name, in the order to show it.

    Raises:
        OSError: If the folder holds none.
    """
    if (folder / "config.json").is_file() and not (folder / "model_index.json").exists():
        return describe_model(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(f"{str(folder)!r} is no checkpoint: it has no model_index.json that can be read.") from error
    kind = index["_class_name"]
    if kind in WHOLES:
        what, parts = WHOLES[kind]
        facts = dict([what])
        for part in parts:
            facts |= {f"{part}'s {name}": value for name, value in describe(folder / part).items()}
        return facts
    known = {
        "AutoregressiveImagePipeline": describe_autoregressive,
        "PixelDiffusionPipeline": describe_diffusion,
        "EmbeddingPriorPipeline": describe_prior,
    }
    facts = known[kind](folder, index) if kind in known else {"pipeline": f"{kind} of diffusers"}
    facts["parameters"] = ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in count_parameters(folder).items())
    if kind in known:
        defaults = index.get("sampling_defaults") or {}
        facts["sampling"] = ", ".join(f"{name} {value}" for name, value in defaults.items()) or "as the library's"
    return facts


def describe_model(folder: Path) -> dict[str, str]:
    """What [`describe`] says about a model that is no pipeline."""
    from llamagen_hf.families import find_model_family, model_class_name

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"config.json in {str(folder)!r} is damaged: {error}.") from error
    family = find_model_family(config)
    if family is None:
        raise OSError(f"{str(folder)!r} holds a model of class {model_class_name(config)!r}, and no checkpoint.")
    facts = {"model": family.noun}
    facts |= describe_clip(folder) if family.model == "CLIPModel" else describe_classifier(config)
    facts["parameters"] = f"{sum(count_parameters(folder, '*.safetensors').values()) / 1e6:.1f}M"
    return facts


def describe_clip(folder: Path) -> dict[str, str]:
    """What [`describe`] says about a CLIP."""
    from transformers import CLIPConfig

    config = CLIPConfig.from_pretrained(folder)
    vision, text = config.vision_config, config.text_config
    patch = f"patches of {vision.patch_size}x{vision.patch_size}"
    return {
        "image": f"{vision.image_size}x{vision.image_size} pixels in {patch}",
        "captions": f"at most {text.max_position_embeddings} tokens of {text.vocab_size}",
        "embeddings": f"{config.projection_dim} wide",
        "encoders": f"{vision.num_hidden_layers} layers, {vision.hidden_size} wide, for images; "
        f"{text.num_hidden_layers} layers, {text.hidden_size} wide, for captions",
    }


def describe_classifier(config: dict) -> dict[str, str]:
    """What [`describe`] says about a classifier of noisy images."""
    labels, side = config["labels"], config["image_size"]
    shown = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
    return {"image": f"{side}x{side} pixels under any noise", "classes": f"{len(labels)}: {shown}"}


def describe_prior(folder: Path, index: dict) -> dict[str, str]:
    """What [`describe`] says about a prior."""
    from diffusers import PriorTransformer

    from llamagen_hf import EmbeddingQuantizer, LlamaGenConfig

    if index.get("quantizer", [None])[0] is None:
        config = PriorTransformer.load_config(folder / "prior")
        length, dim = config["num_embeddings"], config["embedding_dim"]
        how = f"denoised by {config['num_layers']} layers, {index['scheduler'][1]}"
    else:
        config = LlamaGenConfig.from_pretrained(folder / "prior")
        codes = EmbeddingQuantizer.load_config(folder / "quantizer")
        length, dim = config.condition_length, config.condition_dim
        how = f"written as {codes['num_dims']} codes of {codes['num_buckets']} by {config.num_hidden_layers} layers"
    has_images = index.get("image_encoder", [None])[0] is not None
    return {
        "embeddings": f"{dim} wide, {how}",
        "conditioning": f"text, {length} positions",
        "variations": "yes, it has CLIP's image encoder" if has_images else "no, it has no image encoder",
    }


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


def count_parameters(folder: Path, pattern: str = "*/*.safetensors") -> dict[str, int]:
    """The number of weights of each component, by the name of its folder."""
    from safetensors import safe_open

    counts: dict[str, int] = {}
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            count = sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
        counts[path.parent.name] = counts.get(path.parent.name, 0) + count
    return counts
