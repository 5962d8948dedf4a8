"""Rows as samples of a diffusion training: an image, its caption, and all that is drawn at random for it."""

import random
import zlib
from collections.abc import Callable

import torch

from ...data.captions import Captions
from ...data.samples import ImageSamples
from ..schedules import NUM_TIMESTEPS
from .diffusion_config import DiffusionTrainingConfig


class DiffusionSamples:
    """Turns a row into a sample.

    Whatever is random about a row is drawn here, noise as the seed that it comes from. So it does not depend on the
    micro-batch, the process or the step at which a run resumed. A test row always has the same draws.

    Args:
        images ([`~llamagen_hf.data.samples.ImageSamples`]): Makes the images.
        captions ([`~llamagen_hf.data.captions.Captions`], *optional*): Makes the captions.
        config ([`DiffusionTrainingConfig`]): Says what to draw.
        grid (`int`, *optional*, defaults to 1): Windows of `crop_size` begin at multiples of it, in pixels.
        training (`bool`, *optional*, defaults to `True`): Else there are no windows and no dropped captions.
        without_prompt (`bool`, *optional*, defaults to `False`): All captions are empty, all embeddings zero.
    """

    def __init__(
        self,
        images: ImageSamples,
        captions: Captions | None,
        config: DiffusionTrainingConfig,
        grid: int = 1,
        training: bool = True,
        without_prompt: bool = False,
    ):
        self.images, self.captions, self.config = images, captions, config
        self.grid, self.training = grid, training
        self.dropout = config.condition_dropout if training else float(without_prompt)
        self.columns = [images.data.image_column, *(captions.columns if captions else ())]

    def __call__(self, row: dict, rng: random.Random) -> dict:
        """The sample; raises [`~llamagen_hf.data.samples.BadRow`] if there is no usable image or no caption.

        It has `images` `(3, size, size)` in [-1, 1], the `seeds` of their noise, and `timesteps`; with captions
        `caption`; with a CLIP `dropped`, whether zeros replace its embedding; for an upsampler `aug_levels` in [0, 1],
        `redrawn`, whether small images are as a base draws them, and with `crop_size` and in training `crops`, the top
        left corners of windows.
        """
        config = self.config
        sample = self.images(row, rng)
        if self.captions is not None:
            sample["caption"] = self.captions(row, rng)
        if not self.training:
            rng = image_random(sample["images"])
        sample |= {"seeds": rng.getrandbits(63), "timesteps": rng.randrange(NUM_TIMESTEPS)}
        if self.captions is not None and rng.random() < self.dropout:
            sample["caption"] = ""
        if config.clip is not None:
            sample["dropped"] = rng.random() < self.dropout
        if config.low_image_size is not None:
            sample["aug_levels"] = rng.random() * config.max_aug_level
            sample["redrawn"] = config.low_vq_model is not None and rng.random() < config.low_vq_share
            if self.training and config.crop_size is not None:
                places = (self.images.data.image_size - config.crop_size) // self.grid + 1
                sample["crops"] = (self.grid * rng.randrange(places), self.grid * rng.randrange(places))
        return sample


def image_random(image: torch.Tensor) -> random.Random:
    """The randomness of a test row: whichever process reads it, as whichever of its rows, it is the same."""
    return random.Random(zlib.crc32(image.numpy().tobytes()))


class DiffusionCollator:
    """Turns samples into a batch of tensors.

    Args:
        tokenize (`Callable`, *optional*): Turns captions into `input_ids` and `attention_mask`.
    """

    def __init__(self, tokenize: Callable | None = None):
        self.tokenize = tokenize

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = {"images": torch.stack([sample["images"] for sample in samples])}
        for name in samples[0].keys() - {"images", "caption"}:
            batch[name] = torch.tensor([sample[name] for sample in samples])
        if "caption" in samples[0]:
            batch["input_ids"], batch["attention_mask"] = self.tokenize([sample["caption"] for sample in samples])
        return batch
