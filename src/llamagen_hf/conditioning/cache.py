"""Cached states of prompts: computed once, stored in half precision, padded when they are read."""

import numpy as np
import torch
import torch.nn.functional as F

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
