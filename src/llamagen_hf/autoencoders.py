"""Image tokenizers of several libraries behind one interface: pixels in, reconstruction and codes out."""

import json
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
from diffusers import AutoencoderRAE, VQModel
from safetensors import SafetensorError
from torch import nn
from transformers import JanusVQVAE
from transformers.utils import cached_file

from .families import own_class
from .loading.checkpoint import align_weights, shipped_folder


# Names that pipelines give their autoencoder, in order of preference.
COMPONENTS = ("vq_model", "vqvae", "vae", "movq")
# A whole Janus model stores its tokenizer under this prefix.
JANUS_KEYS = {r"^model\.vqmodel\.": ""}
PROBE_SIZE = 128  # a multiple of every factor in use


class RoundTrip(NamedTuple):
    """Images after encoding and decoding.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): The reconstructions, nominally in [-1, 1].
        latents (`torch.Tensor` of shape `(batch, channels, h, w)`): The input of the decoder.
        codes (`torch.LongTensor` of shape `(batch, ...)`, *optional*): Indices into a codebook.
    """

    pixels: torch.Tensor
    latents: torch.Tensor
    codes: torch.LongTensor | None = None


class AutoencoderFacts(NamedTuple):
    """Sizes of an autoencoder.

    Args:
        downsample_factor (`int`): Pixels along each side of one position of the latents.
        channels (`int`): Width of a latent, or of a codebook vector.
        codes (`int`, *optional*): Size of the codebook; `None` for continuous latents.
        parameters (`int`): Number of parameters, encoder and decoder together.
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
            `AutoencoderTiny`, `AutoencoderDC`, ...) or a `JanusVQVAE` of transformers. From a whole pipeline the
            component `vq_model`, `vqvae`, `vae` or `movq` is loaded, from a whole Janus its tokenizer. `"emoji"` is
            the checkpoint that ships with the package; a folder of that name is `"./emoji"`.
        subfolder (`str`, *optional*): Folder of the autoencoder, below `path`.
        kwargs: As for the model's `from_pretrained`, such as `revision` or `dtype`; float32 by default.

    Returns:
        `torch.nn.Module`: The autoencoder, in evaluation mode.

    Raises:
        OSError: If there is none, or if its weights are damaged or incomplete.

    Example:

    ```python
    >>> from llamagen_hf.autoencoders import load_autoencoder

    >>> type(load_autoencoder("emoji")).__name__
    'LlamaGenVQModel'
    ```
    """
    name, path = str(path), str(shipped_folder(path) or Path(path).expanduser())
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
            f"There is no autoencoder {name!r}: no folder and no cached or reachable repository has a "
            f"config.json{where}."
        )
    kind = config.get("_class_name", config.get("model_type"))
    options = {"dtype": torch.float32, "output_loading_info": True} | kwargs | place
    if kind in ("janus", "janus_vqgan"):
        loader, options = JanusVQVAE, options | {"key_mapping": JANUS_KEYS}
    else:
        loader = own_class(str(kind)) or getattr(diffusers, str(kind), None)
    if not (hasattr(loader, "encode") and hasattr(loader, "decode")):
        raise OSError(f"{name!r} holds {kind}, not an autoencoder of diffusers, a LlamaGenVQModel or a JanusVQVAE.")
    try:
        autoencoder, loaded = loader.from_pretrained(path, **options)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".:")
        raise OSError(f"The weights of {name!r} can't be loaded: {reason}.") from error
    if missing := sorted(loaded["missing_keys"]):
        raise OSError(f"The weights of {name!r} lack {len(missing)} parameters, such as {missing[0]}.")
    align_weights(autoencoder)
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
    """The content of a file in a folder or repository; `None` if it is not there or not reachable."""
    try:
        found = cached_file(path, file, **options)
    except OSError:
        return None
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))


@torch.no_grad()
def reconstruct(autoencoder: nn.Module, pixels: torch.Tensor) -> RoundTrip:
    """Encode images and decode them again.

    For a posterior, that of a KL autoencoder, the mean is decoded and nothing is sampled. Scaling and shift factors,
    which are for a diffusion model in between, are left out: a round trip would undo them.

    Args:
        autoencoder (`torch.nn.Module`): What [`load_autoencoder`] returns.
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels in [-1, 1], on its device, of any dtype.
    """
    pixels = pixels.to(autoencoder.dtype)
    if hasattr(autoencoder, "decode_codes"):
        encoded = autoencoder.encode(pixels)
        return RoundTrip(autoencoder.decode(encoded.quantized).sample, encoded.quantized, encoded.codes)
    if isinstance(autoencoder, VQModel):
        latents = autoencoder.encode(pixels).latents
        _, _, (_, _, codes) = autoencoder.quantize(latents)
        return RoundTrip(autoencoder.decode(latents).sample, latents, codes.view(len(pixels), -1))
    if isinstance(autoencoder, JanusVQVAE):
        encoded = autoencoder.encode(pixels)
        codes = encoded.image_tokens.view(len(pixels), -1)
        return RoundTrip(autoencoder.decode(codes), encoded.quantized_last_hidden_state, codes)
    if isinstance(autoencoder, AutoencoderRAE):
        latents = autoencoder.encode((pixels + 1) / 2).latent  # the only one with pixels in [0, 1]
        return RoundTrip(autoencoder.decode(latents).sample * 2 - 1, latents)
    # An autoencoder of videos takes an image as a video of one frame.
    is_video = any(isinstance(module, nn.Conv3d) for module in autoencoder.encoder.modules())
    encoded = autoencoder.encode(pixels.unsqueeze(2) if is_video else pixels)
    latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded[0]
    sample = autoencoder.decode(latents).sample
    return RoundTrip(sample.squeeze(2), latents.squeeze(2)) if is_video else RoundTrip(sample, latents)


def describe_autoencoder(autoencoder: nn.Module) -> AutoencoderFacts:
    """Find the sizes of an autoencoder by sending a blank image through it.

    Raises:
        ValueError: If it is not an autoencoder of RGB images.
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
        reason = str(error).splitlines()[0]
        raise ValueError(f"{type(autoencoder).__name__} does not take RGB images: {reason}") from error
    if result.pixels.shape != blank.shape:
        raise ValueError(
            f"{type(autoencoder).__name__} turns images {tuple(blank.shape)} into {tuple(result.pixels.shape)}; "
            "expected the same shape."
        )
    channels, side_of_latents = result.latents.shape[1], result.latents.shape[-1]
    return AutoencoderFacts(side // side_of_latents, channels, codes, autoencoder.num_parameters(), size)
