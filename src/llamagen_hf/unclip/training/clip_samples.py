"""Rows as samples of a CLIP training: an image, and its caption in tokens."""

import random

import torch
from transformers import PreTrainedTokenizerBase

from ...data.captions import Captions
from ...data.samples import BadRow, ImageSamples


class CLIPSamples:
    """Turns a row into a sample.

    Args:
        images ([`~llamagen_hf.data.samples.ImageSamples`]): Makes the images.
        captions ([`~llamagen_hf.data.captions.Captions`]): Makes the captions.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The CLIP's.
        length (`int`): Longest caption that the CLIP reads, in tokens with its marks.
        truncate (`bool`, *optional*, defaults to `False`): Cut longer captions, which can't be used otherwise.
    """

    def __init__(
        self,
        images: ImageSamples,
        captions: Captions,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        truncate: bool = False,
    ):
        self.images, self.captions, self.tokenizer = images, captions, tokenizer
        self.length, self.truncate = length, truncate
        self.columns = [images.data.image_column, *captions.columns]

    def __call__(self, row: dict, rng: random.Random) -> dict:
        """The sample: `images` `(3, size, size)` in [-1, 1], the `caption` and its `input_ids`.

        Raises:
            BadRow: If there is no usable image, no caption, or one that is too long.
        """
        sample = self.images(row, rng)
        caption = self.captions(row, rng)
        ids = self.tokenizer(caption, truncation=self.truncate, max_length=self.length, verbose=False).input_ids
        if len(ids) > self.length:
            raise BadRow(
                f"caption too long for CLIP: it has {len(ids)} tokens, and {self.length} fit; set truncate_captions "
                "to cut such captions"
            )
        return sample | {"caption": caption, "input_ids": ids}


class CLIPCollator:
    """Turns samples into a batch of tensors: `images`, `input_ids` and `attention_mask`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The CLIP's, which pads captions on the right.
        length (`int`, *optional*): Pad to it, for batches of one shape; by default to a batch's longest caption.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int | None = None):
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        texts = self.tokenizer.pad(
            {"input_ids": [sample["input_ids"] for sample in samples]},
            padding=True if self.length is None else "max_length",
            max_length=self.length,
            padding_side="right",
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"images": torch.stack([sample["images"] for sample in samples]), **texts}
