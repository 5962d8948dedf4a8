"""Conversion of the released LlamaGen checkpoints (FoundationVision/LlamaGen) into this package's models."""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging

from ..conditioning.classes import fetch_imagenet_labels
from ..conditioning.text import load_text_encoder
from .configuration import LlamaGenConfig
from .modeling import LlamaGenForConditionalGeneration
from .pipeline import AutoregressiveImagePipeline
from .vq_model import LlamaGenVQModel


logger = logging.get_logger(__name__)

# Sizes of the released generators, by the suffix of their names.
VARIANTS = {
    "B": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "L": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "XL": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20},
    "XXL": {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24},
    "XXXL": {"hidden_size": 2560, "num_hidden_layers": 48, "num_attention_heads": 40},
    "1B": {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32},
    "3B": {"hidden_size": 3200, "num_hidden_layers": 24, "num_attention_heads": 32},
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
}

# Parts of torch's messages about an intact pickle that holds more than weights.
REFUSED_PICKLES = ("Unsupported global", "Unsupported class", "call reduce", "instantiate")

# Names of the image tokenizer's weights, ours to released, replaced one after the other.
VQ_NAMES = {
    "encoder.down_blocks.": "encoder.conv_blocks.",
    "decoder.up_blocks.": "decoder.conv_blocks.",
    ".mid_block.resnets.0.": ".mid.0.",
    ".mid_block.attentions.0.": ".mid.1.",
    ".mid_block.resnets.1.": ".mid.2.",
    ".resnets.": ".res.",
    ".attentions.": ".attn.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    ".conv_norm_out.": ".norm_out.",
}

# Names of the generator's weights, released to ours. `wqkv` is split and class embeddings are appended, see below.
TRANSFORMER_KEYS = [
    (r"^layers\.(\d+)\.attention\.wo\.", r"model.layers.\1.self_attn.o_proj."),
    (r"^layers\.(\d+)\.attention_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^layers\.(\d+)\.feed_forward\.w1\.", r"model.layers.\1.mlp.gate_proj."),
    (r"^layers\.(\d+)\.feed_forward\.w2\.", r"model.layers.\1.mlp.down_proj."),
    (r"^layers\.(\d+)\.feed_forward\.w3\.", r"model.layers.\1.mlp.up_proj."),
    (r"^layers\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^cls_embedding\.cap_proj\.", "model.text_projector."),
    (r"^cls_embedding\.uncond_embedding$", "model.uncond_embedding.weight"),
    (r"^norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
]


def load_released(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of a released file, wherever in the file they are.

    Released files hold their weights under "model" (DDP), "module" (DeepSpeed), "state_dict", or at the top (FSDP).
    Averaged weights, under "ema", take precedence. Prefixes such as `module.` and `_orig_mod.` are dropped. No code in
    the file is executed. The weights are on the CPU.

    Args:
        path (`str` or `Path`): A `.pt` or safetensors file.

    Raises:
        ValueError: If the file is missing or damaged, holds pickled code, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Training checkpoints hold their arguments as a namespace, which is plain data.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which exception torch's unpickler raises depends on the bytes of the file
        if isinstance(error, UnpicklingError) and any(word in str(error) for word in REFUSED_PICKLES):
            raise ValueError(f"{path.name} holds pickled code beside its weights, so it is not loaded.") from error
        raise ValueError(f"{path.name} is damaged or not a checkpoint.") from error
    for wrapper in ("ema", "model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict) and content[wrapper]:
            if wrapper == "ema":
                logger.warning(f"{path.name} holds averaged weights (ema); using those.")
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path.name} holds no model weights.")
    weights = {_unwrapped(key): value for key, value in content.items()}
    if len(weights) < len(content):
        raise ValueError(f"{path.name} holds weights twice, with and without a prefix such as module.")
    return weights


def _unwrapped(key: str) -> str:
    """Remove from a name what `torch.compile`, DDP, DeepSpeed and FSDP add to it."""
    key = re.sub(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", key)
    return re.sub(r"^(module\.)+", "", key)


def _check_keys(what: str, found: dict[str, torch.Size], expected: dict[str, torch.Size]) -> None:
    """Raise a `ValueError` that lists every name that is unknown, missing or of the wrong shape."""
    problems = [f"unknown {key}" for key in sorted(found.keys() - expected.keys())]
    problems += [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [
        f"{key} is {tuple(found[key])}, expected {tuple(expected[key])}"
        for key in sorted(found.keys() & expected.keys())
        if tuple(found[key]) != tuple(expected[key])
    ]
    if problems:
        raise ValueError(f"These weights are not those of {what}: {'; '.join(problems)}.")


def _check_ranks(what: str, state_dict: dict[str, torch.Tensor], ranks: dict[str, int]) -> None:
    """Raise a `ValueError` unless the weights in `ranks`, which give the sizes, exist with that many dimensions."""
    for key, rank in ranks.items():
        if key not in state_dict:
            raise ValueError(f"These weights are not those of {what}: missing {key}.")
        if state_dict[key].ndim != rank:
            shape = tuple(state_dict[key].shape)
            raise ValueError(f"These weights are not those of {what}: {key} is {shape}, expected {rank} dimensions.")


def _released_vq_name(key: str) -> str:
    for ours, released in VQ_NAMES.items():
        key = key.replace(ours, released)
    return key


def vq_model_from_released(state_dict: dict[str, torch.Tensor]) -> LlamaGenVQModel:
    """Build a [`LlamaGenVQModel`] in evaluation mode from released weights, whose shapes determine its sizes.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Weights of VQ-16, VQ-8 or any other size of the released tokenizer.

    Raises:
        ValueError: If names are unknown, missing or of the wrong shape; the message lists them.
    """
    released = {key: value for key, value in state_dict.items() if key != "quantize.codebook_used"}
    _check_ranks(
        "a LlamaGen tokenizer",
        released,
        {
            "encoder.conv_in.weight": 4,
            "encoder.conv_blocks.0.res.0.conv1.weight": 4,
            "encoder.conv_out.weight": 4,
            "decoder.conv_out.weight": 4,
            "quantize.embedding.weight": 2,
        },
    )
    levels = [key for key in released if re.fullmatch(r"encoder\.conv_blocks\.\d+\.res\.0\.conv1\.weight", key)]
    levels.sort(key=lambda key: int(key.split(".")[2]))
    blocks = [key for key in released if re.fullmatch(r"encoder\.conv_blocks\.0\.res\.\d+\.conv1\.weight", key)]
    with torch.device("meta"):
        model = LlamaGenVQModel(
            in_channels=released["encoder.conv_in.weight"].shape[1],
            out_channels=released["decoder.conv_out.weight"].shape[0],
            block_out_channels=tuple(released[key].shape[0] for key in levels),
            layers_per_block=len(blocks),
            latent_channels=released["encoder.conv_out.weight"].shape[0],
            num_vq_embeddings=released["quantize.embedding.weight"].shape[0],
            vq_embed_dim=released["quantize.embedding.weight"].shape[1],
        )
    names = {key: _released_vq_name(key) for key in model.state_dict()}
    expected = {names[key]: value.shape for key, value in model.state_dict().items()}
    # Attention projections are 1x1 convolutions in the released code and linear layers here.
    is_projection = re.compile(r".*\.(q|k|v|proj_out)\.weight")
    expected = {name: (*shape, 1, 1) if is_projection.fullmatch(name) else shape for name, shape in expected.items()}
    _check_keys("a LlamaGen tokenizer", {name: value.shape for name, value in released.items()}, expected)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    converted = {key: released[name].view(shapes[key]) for key, name in names.items()}
    model.load_state_dict(converted, assign=True)
    return model.eval()


def _released_shapes(config: LlamaGenConfig) -> dict[str, torch.Size]:
    """Return the names and shapes of a released generator's weights, for this configuration."""
    width, hidden = config.hidden_size, config.intermediate_size
    kv_width = config.num_key_value_heads * config.head_dim
    shapes = {
        "tok_embeddings.weight": (config.vocab_size, width),
        "norm.weight": (width,),
        "output.weight": (config.vocab_size, width),
    }
    if config.conditioning == "class":
        shapes["cls_embedding.embedding_table.weight"] = (config.num_classes + 1, width)
    else:
        shapes["cls_embedding.uncond_embedding"] = (config.condition_length, config.condition_dim)
        shapes["cls_embedding.cap_proj.fc1.weight"] = (width, config.condition_dim)
        shapes["cls_embedding.cap_proj.fc2.weight"] = (width, width)
    for i in range(config.num_hidden_layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (width + 2 * kv_width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.feed_forward.w1.weight": (hidden, width),
            f"layers.{i}.feed_forward.w2.weight": (width, hidden),
            f"layers.{i}.feed_forward.w3.weight": (hidden, width),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
        }
    return shapes


def _half_split(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head from rotary pairs (2i, 2i + 1) to pairs (i, i + head_dim / 2)."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def convert_transformer_state_dict(
    state_dict: dict[str, torch.Tensor], config: LlamaGenConfig
) -> dict[str, torch.Tensor]:
    """Convert a released generator's weights to a state dict of [`LlamaGenForConditionalGeneration`].

    Args:
        state_dict (`dict[str, torch.Tensor]`): The released weights.
        config ([`LlamaGenConfig`]): The sizes that they must have.

    Raises:
        ValueError: If names are unknown, missing or of the wrong shape; the message lists them.
    """
    released = {key: value for key, value in state_dict.items() if key != "freqs_cis"}  # a stale table, never read
    shapes = {key: value.shape for key, value in released.items()}
    _check_keys("a LlamaGen generator of this configuration", shapes, _released_shapes(config))

    kv_width = config.num_key_value_heads * config.head_dim
    converted = {}
    for key, value in released.items():
        if key.endswith("attention.wqkv.weight"):
            q, k, v = value.split([config.hidden_size, kv_width, kv_width])
            attention = f"model.layers.{key.split('.')[1]}.self_attn"
            converted[f"{attention}.q_proj.weight"] = _half_split(q, config.head_dim)
            converted[f"{attention}.k_proj.weight"] = _half_split(k, config.head_dim)
            converted[f"{attention}.v_proj.weight"] = v.clone()
        elif key not in ("tok_embeddings.weight", "cls_embedding.embedding_table.weight"):
            for pattern, name in TRANSFORMER_KEYS:
                key = re.sub(pattern, name, key)
            converted[key] = value
    embeddings = [released["tok_embeddings.weight"]]
    if config.conditioning == "class":
        embeddings.append(released["cls_embedding.embedding_table.weight"])
    converted["model.embed_tokens.weight"] = torch.cat(embeddings)
    return converted


def transformer_from_released(
    state_dict: dict[str, torch.Tensor], variant: str, grid_size: int, id2label: dict[int, str] | None = None
) -> LlamaGenForConditionalGeneration:
    """Build a [`LlamaGenForConditionalGeneration`] in evaluation mode from released weights.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            The released weights. Their shapes determine the sizes that `variant` leaves open.
        variant (`str`): A key of [`VARIANTS`].
        grid_size (`int`): Side of the code grid: the image's side divided by the tokenizer's `downsample_factor`.
        id2label (`dict[int, str]`, *optional*): Class names.

    Raises:
        ValueError: If the weights are of another variant, or if names are unknown, missing or of the wrong shape.
    """
    if variant not in VARIANTS:
        raise ValueError(f"There is no variant {variant!r}; expected one of {', '.join(VARIANTS)}.")
    sizes = VARIANTS[variant]
    ranks = {key: 2 for key in ("cls_embedding.uncond_embedding", "cls_embedding.embedding_table.weight")}
    ranks = {key: rank for key, rank in ranks.items() if key in state_dict} | {"tok_embeddings.weight": 2}
    _check_ranks("a LlamaGen generator", state_dict, ranks)
    vocab_size, width = state_dict["tok_embeddings.weight"].shape
    layers = sum(bool(re.fullmatch(r"layers\.\d+\.attention\.wqkv\.weight", key)) for key in state_dict)
    if (width, layers) != (sizes["hidden_size"], sizes["num_hidden_layers"]):
        fitting = [
            name for name, v in VARIANTS.items() if (v["hidden_size"], v["num_hidden_layers"]) == (width, layers)
        ]
        hint = f"; that is variant {fitting[0]}" if fitting else ""
        raise ValueError(
            f"The generator's weights are {width} wide with {layers} layers{hint}, but variant {variant} is "
            f"{sizes['hidden_size']} wide with {sizes['num_hidden_layers']}."
        )
    if "cls_embedding.uncond_embedding" in state_dict:
        length, dim = state_dict["cls_embedding.uncond_embedding"].shape
        condition = {"conditioning": "text", "condition_length": length, "condition_dim": dim}
        condition |= {"condition_rotary": "zero", "prompt_cleaning": "released"}
    elif "cls_embedding.embedding_table.weight" in state_dict:
        # The last row is the null class.
        condition = {"num_classes": state_dict["cls_embedding.embedding_table.weight"].shape[0] - 1}
        condition["id2label"] = id2label
    else:
        raise ValueError("These weights are not those of a LlamaGen generator: they have no cls_embedding.")
    config = LlamaGenConfig(**sizes, **condition, vocab_size=vocab_size, grid_size=grid_size)
    with torch.device("meta"):
        transformer = LlamaGenForConditionalGeneration(config)
    transformer.load_state_dict(convert_transformer_state_dict(state_dict, config), assign=True)
    return transformer.eval()


def convert_checkpoint(
    vq_checkpoint: str | Path,
    transformer_checkpoint: str | Path,
    variant: str,
    image_size: int,
    output: str | Path,
    text: bool = False,
    text_encoder: str | None = None,
    id2label: dict[int, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Convert a released tokenizer and generator into a pipeline folder, which appears only once it is complete.

    Args:
        vq_checkpoint (`str` or `Path`): The released tokenizer, such as vq_ds16_c2i.pt.
        transformer_checkpoint (`str` or `Path`): The released generator, such as c2i_B_256.pt.
        variant (`str`): Size of the generator, a key of [`VARIANTS`].
        image_size (`int`): Side of its images, in pixels.
        output (`str` or `Path`): A folder that does not exist yet.
        text (`bool`, *optional*, defaults to `False`): Whether the generator is text-conditional.
        text_encoder (`str`, *optional*):
            Folder or Hub id of a text encoder with its tokenizer to include: FLAN-T5-XL for the released weights.
        id2label (`dict[int, str]`, *optional*):
            Class names of a class-conditional generator. By default, a generator with 1000 classes gets ImageNet's
            names from the Hub if the Hub can be reached.
        dtype (`torch.dtype`, *optional*): Dtype of the saved weights; by default that of the released ones.

    Raises:
        ValueError: If a file is missing or damaged, if the files, `variant`, `image_size`, `text` and `id2label`
            contradict each other, or if `output` exists or can't be written.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"The output {str(output)!r} already exists; name a new folder.")
    vq_model = vq_model_from_released(load_released(vq_checkpoint))
    grid_size, rest = divmod(image_size, vq_model.downsample_factor)
    if rest or grid_size < 1:
        raise ValueError(
            f"The image size {image_size} is not a multiple of the tokenizer's {vq_model.downsample_factor}."
        )
    vq_model.register_to_config(sample_size=image_size)
    transformer = transformer_from_released(load_released(transformer_checkpoint), variant, grid_size, id2label)
    config = transformer.config
    if text != (config.conditioning == "text"):
        wanted = "text" if text else "class"
        raise ValueError(f"The generator's weights are {config.conditioning}-conditional, not {wanted}-conditional.")
    if id2label is not None and text:
        raise ValueError("Class names need a class-conditional generator, but this one is text-conditional.")
    if id2label is not None and set(id2label) != set(range(config.num_classes)):
        raise ValueError(
            f"The {len(id2label)} class names must have the ids 0..{config.num_classes - 1}, one name per class."
        )
    if id2label is None and not text and config.num_classes == 1000:
        try:
            config.id2label = fetch_imagenet_labels()
        except OSError:
            logger.warning("ImageNet's class names can't be fetched, so classes have ids only; or pass `id2label`.")
    if config.vocab_size != vq_model.config.num_vq_embeddings:
        raise ValueError(
            f"The generator has {config.vocab_size} codes, but the tokenizer has "
            f"{vq_model.config.num_vq_embeddings}; these two files do not belong together."
        )
    encoder, tokenizer = (None, None) if text_encoder is None else load_text_encoder(text_encoder)
    pipe = AutoregressiveImagePipeline(vq_model, transformer, encoder, tokenizer)
    if dtype is not None:
        pipe.to(dtype)
    save_complete(pipe, output)


def save_complete(pipe: AutoregressiveImagePipeline, output: Path) -> None:
    """Save a pipeline as the folder `output`, which appears only once it is complete."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise ValueError(f"The output {str(output)!r} can't be written: {error.strerror or error}.") from error
    try:
        pipe.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(output)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"The output {str(output)!r} can't be written: {reason}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
