"""Prompts and small images as a pixel diffusion U-Net reads them."""

import textwrap
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.utils import logging

from ..conditioning.text import PromptCleaning, PromptLoss, encode_tokens, find_loss, tokenize_prompts
from ..images.reading import read_image
from ..images.transforms import to_tensor
from ..reproducibility import in_own_precision
from .schedules import enlarge


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Convention:
    """How a checkpoint's inputs were made when it was trained.

    Args:
        prompt_cleaning (`str`): See [`~llamagen_hf.conditioning.text.clean_prompt`].
        masks_padding (`bool`): Whether padded positions of a prompt are hidden, or read like words.
        enlargement (`str`): See [`~llamagen_hf.diffusion.schedules.enlarge`].
        corrects_guess (`bool`): Whether the U-Net of an upsampler predicts all, or what is left by
            [`~llamagen_hf.diffusion.preconditioning.linear_guess`].
    """

    prompt_cleaning: PromptCleaning
    masks_padding: bool
    enlargement: Literal["bicubic", "bilinear"]
    corrects_guess: bool

    def encode(
        self, text_encoder: PreTrainedModel, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, length: int
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """Run a text encoder; arguments and result as for [`~llamagen_hf.conditioning.text.encode_tokens`].

        Where padding is read, it stays on the right, and the mask is 1.
        """
        if self.masks_padding:
            return encode_tokens(text_encoder, input_ids, attention_mask, length)
        states = text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        return states, torch.ones_like(attention_mask)


CONVENTIONS = {
    "own": Convention("unicode", True, "bicubic", True),
    "deepfloyd": Convention("released", False, "bilinear", False),
}


class EncodingMixin:
    """Encodes prompts and small images for the U-Net of a pipeline."""

    @property
    def convention(self) -> Convention:
        """How the inputs are made."""
        return CONVENTIONS[self.config.convention]

    @torch.no_grad()
    @in_own_precision
    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.LongTensor]:
        """Clean, tokenize and encode prompts; a warning says of which nothing is left, and which are cut.

        Returns:
            What `__call__` takes as `prompt_embeds` `(batch, condition_length, condition_dim)` and
            `prompt_attention_mask` `(batch, condition_length)`. Padding is on the left and zero; for DeepFloyd IF,
            which reads it, it is on the right and the mask is 1.
        """
        self._check_reads_prompts()
        prompts = [prompt] if isinstance(prompt, str) else prompt
        for each in prompts:
            if loss := self.find_loss(each):
                logger.warning_once(f"{loss.sentence} It is {textwrap.shorten(each, 200)!r}.")
        length, cleaning = self.config.condition_length, self.convention.prompt_cleaning
        tokens = tokenize_prompts(self.tokenizer, prompts, length, cleaning)
        input_ids, mask = (each.to(self._execution_device) for each in tokens)
        return self.convention.encode(self.text_encoder, input_ids, mask, length)

    def find_loss(self, prompt: str) -> PromptLoss | None:
        """What this checkpoint does not read of a prompt, see [`~llamagen_hf.conditioning.text.find_loss`]."""
        self._check_reads_prompts()
        return find_loss(self.tokenizer, prompt, self.config.condition_length, self.convention.prompt_cleaning)

    def _check_reads_prompts(self) -> None:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("This pipeline has no text encoder and tokenizer to encode prompts: load them as well.")

    def encode_image(self, image: Image.Image | list[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Enlarge images to the size of the U-Net.

        Args:
            image (`PIL.Image.Image`, `list[PIL.Image.Image]` or `torch.Tensor` of shape `(batch, 3, h, w)`):
                Square images, at most as large. Tensors are in [0, 1]; other images are read by
                [`~llamagen_hf.images.reading.read_image`].

        Returns:
            `torch.Tensor` of shape `(batch, 3, image_size, image_size)`: float32, in [-1, 1].
        """
        if isinstance(image, torch.Tensor):
            pixels = [2 * image.float() - 1]
        else:
            pixels = [to_tensor(read_image(each))[None] for each in (image if isinstance(image, list) else [image])]
        device, mode = self._execution_device, self.convention.enlargement
        return torch.cat([enlarge(each.to(device), self.image_size, mode) for each in pixels])
