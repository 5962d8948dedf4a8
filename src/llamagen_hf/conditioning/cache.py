"""Cached states of prompts and of images: computed once, stored in half precision, padded when they are read."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BaseImageProcessor

from ..clip import load_clip, pixel_values
from .text import encode_tokens, load_text_encoder, tokenize_prompts


class TextFeatures:
    """A text encoder that turns prompts into states for storage.

    Args:
        path (`str`): Folder or Hub id of the text encoder, with its tokenizer.
        length (`int`): Positions of a prompt; longer ones are cut.
        cleaning (`str`): How prompts are cleaned, see [`~llamagen_hf.conditioning.text.clean_prompt`].
        device (`torch.device`): Where the text encoder runs.
        dtype (`torch.dtype`): What it runs in.
    """

    def __init__(self, path: str, length: int, cleaning: str, device: torch.device, dtype: torch.dtype):
        self.text_encoder, self.tokenizer = load_text_encoder(path)
        self.text_encoder.to(device, dtype)
        self.length, self.cleaning = length, cleaning

    @property
    def dim(self) -> int:
        """Width of a state."""
        return self.text_encoder.config.hidden_size

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> list[bytes]:
        """Each prompt's states without padding, as bytes for [`decode_states`]."""
        input_ids, mask = tokenize_prompts(self.tokenizer, prompts, self.length, self.cleaning)
        device = self.text_encoder.device
        states, mask = encode_tokens(self.text_encoder, input_ids.to(device), mask.to(device), self.length)
        # Arrow has half-precision lists too, but reads them number by number.
        return [s[m.bool()].half().cpu().numpy().tobytes() for s, m in zip(states, mask, strict=True)]


class ImageFeatures:
    """A frozen CLIP that turns images into conditions: their embeddings of length 1, as a prompt of one position.

    They are those of [`~llamagen_hf.clip.embed_images`], so that `pipe(prompt_embeds=embeddings[:, None])` draws from
    the embedding of any image.

    Args:
        path (`str`): Folder or Hub id of the CLIP, see [`~llamagen_hf.clip.load_clip`].
        device (`torch.device`): Where it runs.

    Attributes:
        read (`Callable`): Turns an image into what the CLIP reads of it, `(3, size, size)`.
        dim (`int`): Width of an embedding.

    Raises:
        OSError: There is no CLIP.
    """

    def __init__(self, path: str, device: torch.device):
        self.clip, self.processor = load_clip(path)
        self.clip.to(device).requires_grad_(False)
        self.read = partial(_read_image, self.processor.image_processor)  # without the weights, for workers
        self.dim = self.embed(self.read(Image.new("RGB", (8, 8)))[None]).shape[-1]

    @torch.no_grad()
    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings `(batch, 1, dim)`, in float32, of what `read` returned for each image."""
        pixels = pixels.to(self.clip.device, self.clip.dtype)
        embeddings = self.clip.get_image_features(pixel_values=pixels).pooler_output.float()
        return F.normalize(embeddings, dim=-1)[:, None]

    def embed_tensor(self, images: torch.Tensor) -> torch.Tensor:
        """The same of square images `(batch, 3, size, size)` in [-1, 1]."""
        return self.embed(pixel_values(self.processor, images))

    def encode(self, pixels: torch.Tensor) -> list[bytes]:
        """The same as of [`embed`], each as bytes for [`decode_states`]."""
        embeddings = self.embed(pixels)
        if not embeddings.isfinite().all():
            raise ValueError("The CLIP makes embeddings that are not finite.")
        return [embedding.half().cpu().numpy().tobytes() for embedding in embeddings]


def _read_image(image_processor: BaseImageProcessor, image: Image.Image) -> torch.Tensor:
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


def decode_states(value: bytes, dim: int) -> torch.Tensor:
    """Stored states as a `(positions, dim)` half-precision tensor."""
    return torch.from_numpy(np.frombuffer(value, np.float16).reshape(-1, dim).copy())


def pad_left(states: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """States of several prompts as one float32 batch, as [`~llamagen_hf.conditioning.text.encode_tokens`] returns it.

    Args:
        states (`list[torch.Tensor]`): One `(positions, dim)` tensor a prompt; beyond `length` it is cut at the end.
        length (`int`): Positions of the result.

    Returns:
        States `(batch, length, dim)`, zero at padded positions, and their mask `(batch, length)`.
    """
    states = [s[:length] for s in states]
    padded = torch.stack([F.pad(s.float(), (0, 0, length - len(s), 0)) for s in states])
    counts = torch.tensor([len(s) for s in states])
    return padded, (torch.arange(length) >= length - counts[:, None]).long()
