"""Rows as samples of a prior's training: an image and a caption as CLIP reads them, and what is drawn at random."""

import random
import textwrap
import zlib

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ...conditioning.text import tokenize_prompts
from ...data.captions import Captions
from ...data.samples import BadRow, decode_image
from ...data.source import DataConfig
from ..clip_encoders import PROMPT_CLEANING, is_too_long
from .prior_config import PriorTrainingConfig


NUM_TIMESTEPS = 1000


class PriorSamples:
    """Turns a row into a sample.

    Whatever is random about a row is drawn here, noise as the seed that it comes from. So it does not depend on the
    micro-batch, the process or the step at which a run resumed. A test row always has the same draws.

    Args:
        data ([`~llamagen_hf.data.source.DataConfig`]): Column and lowest size of the images.
        captions ([`~llamagen_hf.data.captions.Captions`]): Makes the captions.
        config ([`PriorTrainingConfig`]): Says what to draw.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): CLIP's.
        image_processor ([`~transformers.BaseImageProcessor`]): CLIP's.
        length (`int`): Positions of a caption.
        training (`bool`, *optional*, defaults to `True`): Else no captions are dropped.
    """

    def __init__(
        self,
        data: DataConfig,
        captions: Captions,
        config: PriorTrainingConfig,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        length: int,
        training: bool = True,
    ):
        self.data, self.captions, self.config = data, captions, config
        self.tokenizer, self.image_processor, self.length = tokenizer, image_processor, length
        self.training = training
        # An autoregressive prior drops captions itself, and learns what stands in their place.
        self.dropout = config.condition_dropout if training and config.kind == "diffusion" else 0.0
        self.columns = [data.image_column, *captions.columns]

    def __call__(self, row: dict, rng: random.Random) -> dict:
        """The sample: `pixel_values` `(3, side, side)`, `caption`, the `seeds` of noise and `timesteps`.

        Raises:
            BadRow: If there is no usable image or no caption, or if it is too long.
        """
        image = decode_image(row[self.data.image_column], self.data.min_image_size)
        pixels = self.image_processor(image, return_tensors="pt").pixel_values[0]
        caption = self.captions(row, rng)
        if not self.config.truncate_captions and is_too_long(self.tokenizer, caption, self.length):
            raise BadRow(f"caption longer than CLIP's {self.length} positions: {textwrap.shorten(caption, 60)!r}")
        if not self.training:  # whichever process reads the row, as whichever of its rows
            rng = random.Random(zlib.crc32(pixels.numpy().tobytes() + caption.encode()))
        sample = {"pixel_values": pixels, "seeds": rng.getrandbits(63), "timesteps": rng.randrange(NUM_TIMESTEPS)}
        return sample | {"caption": "" if rng.random() < self.dropout else caption}

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Samples as a batch of tensors, captions also as `input_ids` and `attention_mask`."""
        batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
        for name in ("seeds", "timesteps"):
            batch[name] = torch.tensor([sample[name] for sample in samples])
        captions = [sample["caption"] for sample in samples]
        tokens = tokenize_prompts(self.tokenizer, captions, self.length, PROMPT_CLEANING)
        return batch | {"captions": captions, "input_ids": tokens[0], "attention_mask": tokens[1]}
