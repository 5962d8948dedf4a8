"""Image tokenizers of several libraries, seen alike: pixels in, reconstruction and codes out."""

import json
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import AutoencoderRAE, VQModel
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import JanusVQVAE

from .families import own_class
from .loading.checkpoint import EMOJI_CHECKPOINT, is_shipped


# What pipelines call their autoencoder, the first that is there being meant.
COMPONENTS = ("vq_model", "vqvae", "vae", "movq")
# Janus as a whole holds its tokenizer under these names.
JANUS_KEYS = {r"^model\.vqmodel\.": ""}
PROBE_SIZE = 128  # a multiple of every factor in use


class RoundTrip(NamedTuple):
    """What became of images.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): The reconstructions, nominally in [-1, 1].
        latents (`torch.Tensor` of shape `(batch, channels, h, w)`): What is between encoder and decoder.
        codes (`torch.LongTensor` of shape `(batch, ...)`, *optional*): Those of a codebook.
    """

    pixels: torch.Tensor
    latents: torch.Tensor
    codes: torch.LongTensor | None = None


class AutoencoderFacts(NamedTuple):
    """What an autoencoder is.

    Args:
        downsample_factor (`int`): Pixels along each side of one cell of the latents.
        channels (`int`): Numbers in a cell: of a latent, or of a codebook vector.
        codes (`int`, *optional*): Size of the codebook; `None` for continuous latents.
        parameters (`int`): Encoder and decoder together.
        image_size (`int`, *optional*): The only side it takes, in pixels; `None` for any multiple of the factor.
    """

    downsample_factor: int
    channels: int
    codes: int | None
    parameters: int
    image_size: int | None


def load_autoencoder(path: str | Path, subfolder: str | None = None, **kwargs) -> nn.Module:
    """Load an image tokenizer from a folder or the Hub.

    Args:
        path (`str` or `os.PathLike`): A [`LlamaGenVQModel`], any autoencoder of diffusers (`AutoencoderKL`, `VQModel`,
            `AutoencoderTiny`, `AutoencoderDC`, ...) or a `JanusVQVAE` of transformers. Of a whole pipeline its
            component `vq_model`, `vqvae`, `vae` or `movq` is taken, of a whole Janus its tokenizer. `"emoji"` is the
            checkpoint that ships with the package; a folder of that name is `"./emoji"`.
        subfolder (`str`, *optional*): Where in it the autoencoder is, if not there.
        kwargs: As for `from_pretrained` of the model, such as `revision` or `dtype`, by default float32.

    Returns:
        `torch.nn.Module`: The autoencoder, in evaluation mode.

    Raises:
        OSError: In one sentence, if there is none, or if its weights are damaged or incomplete.

    Example:

    ```python
    >>> from llamagen_hf.autoencoders import load_autoencoder

    >>> type(load_autoencoder("emoji")).__name__
    'LlamaGenVQModel'
    ```
    """
    name = str(path)
    path = EMOJI_CHECKPOINT if is_shipped(path) else Path(path).expanduser()
    path = str(path)
    hub = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in kwargs}
    if subfolder is None:
        components = _read_json(path, "model_index.json", hub) or {}
        subfolder = next((component for component in COMPONENTS if components.get(component, [None])[0]), None)
        if components and subfolder is None:
            raise OSError(f"The pipeline {name!r} has no component {', '.join(COMPONENTS[:-1])} or {COMPONENTS[-1]}.")
    place = {} if subfolder is None else {"subfolder": subfolder}
    config = _read_json(path, "config.json", hub | place)
    if config is None:
        where = "" if subfolder is None else f" in {subfolder!r}"
        raise OSError(
            f"There is no autoencoder {name!r}: no folder and no repository, in the cache or within reach, that has a "
            f"config.json{where}."
        )
    kind = config.get("_class_name", config.get("model_type"))
    options = {"dtype": torch.float32, "output_loading_info": True} | kwargs | place
    if kind in ("janus", "janus_vqgan"):
        loader, options = JanusVQVAE, options | {"key_mapping": JANUS_KEYS}
    else:
        loader = own_class(str(kind)) or getattr(diffusers, str(kind), None)
    if not (hasattr(loader, "encode") and hasattr(loader, "decode")):
        raise OSError(
            f"{name!r} holds no autoencoder but {kind}; expected one of diffusers, a LlamaGenVQModel or a JanusVQVAE."
        )
    try:
        autoencoder, loaded = loader.from_pretrained(path, **options)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".:")
        raise OSError(f"The weights of {name!r} can't be loaded: {reason}.") from error
    if missing := sorted(loaded["missing_keys"]):
        raise OSError(f"The weights of {name!r} miss {len(missing)} parameters, such as {missing[0]}.")
    return autoencoder.eval()


def load_vq_model(path: str, **kwargs) -> nn.Module:
    """Load the [`LlamaGenVQModel`] of a folder or a Hub id, or of the pipeline that is there.

    Args:
        path (`str`): As for [`load_autoencoder`].
        kwargs: The same.

    Raises:
        ValueError: There is none, or it can't be loaded.
    """
    try:
        vq_model = load_autoencoder(path, **kwargs)
    except OSError as error:
        if Path(path).is_dir():  # where the reason helps
            raise ValueError(str(error)) from error
        raise ValueError(
            f"There is no image tokenizer {str(path)!r}, neither as a folder nor as a Hub repository; train one first."
        ) from error
    if not hasattr(vq_model, "decode_codes"):
        raise ValueError(f"{str(path)!r} holds {type(vq_model).__name__}; expected an image tokenizer of LlamaGen's.")
    return vq_model


def _read_json(path: str, file: str, options: dict) -> dict | None:
    """The content of a file of a folder or repository; `None` if it can't be had."""
    if Path(path).is_dir():
        found = Path(path, options.get("subfolder", ""), file)
        return json.loads(found.read_text(encoding="utf-8")) if found.is_file() else None
    try:
        return json.loads(Path(hf_hub_download(path, file, **options)).read_text(encoding="utf-8"))
    except (EntryNotFoundError, HFValidationError, HTTPError, OSError):
        return None


@torch.no_grad()
def reconstruct(autoencoder: nn.Module, pixels: torch.Tensor) -> RoundTrip:
    """Encode images and decode them again.

    Of a posterior, that of a KL autoencoder, the mean is taken and nothing is drawn. Scaling and shift factors, which
    are for the diffusion model in between, are left out: a round trip would undo them.

    Args:
        autoencoder (`torch.nn.Module`): What [`load_autoencoder`] gives.
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels in [-1, 1], on its device, of any dtype.
    """
    pixels = pixels.to(autoencoder.dtype)
    if hasattr(autoencoder, "decode_codes"):
        encoded = autoencoder.encode(pixels)
        return RoundTrip(autoencoder.decode(encoded.quantized).sample, encoded.quantized, encoded.codes)
    for kind, through in ADAPTERS.items():
        if isinstance(autoencoder, kind):
            return through(autoencoder, pixels)
    return _through_latents(autoencoder, pixels)


def _through_vq_model(autoencoder: VQModel, pixels: torch.Tensor) -> RoundTrip:
    latents = autoencoder.encode(pixels).latents
    _, _, (_, _, codes) = autoencoder.quantize(latents)
    return RoundTrip(autoencoder.decode(latents).sample, latents, codes.view(len(pixels), -1))


def _through_janus(autoencoder: JanusVQVAE, pixels: torch.Tensor) -> RoundTrip:
    encoded = autoencoder.encode(pixels)
    codes = encoded.image_tokens.view(len(pixels), -1)
    return RoundTrip(autoencoder.decode(codes), encoded.quantized_last_hidden_state, codes)


def _through_rae(autoencoder: AutoencoderRAE, pixels: torch.Tensor) -> RoundTrip:
    latents = autoencoder.encode((pixels + 1) / 2).latent  # alone among them it has pixels in [0, 1]
    return RoundTrip(autoencoder.decode(latents).sample * 2 - 1, latents)


def _through_latents(autoencoder: nn.Module, pixels: torch.Tensor) -> RoundTrip:
    """Any other autoencoder of diffusers; one of videos takes an image as a video of one frame."""
    is_video = any(isinstance(module, nn.Conv3d) for module in autoencoder.encoder.modules())
    encoded = autoencoder.encode(pixels.unsqueeze(2) if is_video else pixels)
    latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
    sample = autoencoder.decode(latents).sample
    return RoundTrip(sample.squeeze(2), latents.squeeze(2)) if is_video else RoundTrip(sample, latents)


ADAPTERS = {
    VQModel: _through_vq_model,
    JanusVQVAE: _through_janus,
    AutoencoderRAE: _through_rae,
}


def describe_autoencoder(autoencoder: nn.Module) -> AutoencoderFacts:
    """What an autoencoder is, found by sending a blank image through it.

    Raises:
        ValueError: In one sentence, if it is none of RGB images.
    """
    size = codes = None
    if isinstance(autoencoder, JanusVQVAE):
        config = autoencoder.config
        size, codes = config.num_patches * 2 ** (len(config.channel_multiplier) - 1), config.num_embeddings
    elif isinstance(autoencoder, AutoencoderRAE):
        size = autoencoder.decoder_image_size
    else:
        codes = autoencoder.config.get("num_vq_embeddings")
    side = PROBE_SIZE if size is None else size
    blank = torch.zeros(1, 3, side, side, device=autoencoder.device)
    try:
        result = reconstruct(autoencoder, blank)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{type(autoencoder).__name__} takes no RGB images: {str(error).splitlines()[0]}") from error
    if result.pixels.shape != blank.shape:
        raise ValueError(
            f"{type(autoencoder).__name__} makes {tuple(result.pixels.shape)} of images {tuple(blank.shape)}; "
            "expected the same shape."
        )
    channels, side_of_latents = result.latents.shape[1], result.latents.shape[-1]
    return AutoencoderFacts(side // side_of_latents, channels, codes, autoencoder.num_parameters(), size)
