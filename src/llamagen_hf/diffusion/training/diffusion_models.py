"""The models of a diffusion training: what it starts with, and what it learns from."""

from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...conditioning.cache import ImageFeatures
from ...conditioning.text import load_text_encoder
from ...data.captions import caption_corpus
from ...data.source import DataConfig
from ...training.text_encoder import build_text_encoder, train_text_tokenizer
from ..pipeline import PixelDiffusionPipeline
from ..schedules import check_scheduler, training_scheduler
from ..unet import condition_dim, efficient_unet, learns_variance, patch_size, reads_text, upsamples
from .diffusion_config import DiffusionTrainingConfig


CONDITION_LENGTH = 77


@dataclass
class DiffusionModels:
    """What a diffusion training starts with.

    Args:
        unet ([`~diffusers.UNet2DConditionModel`]): The U-Net to train.
        scheduler ([`~diffusers.DDPMScheduler`]): The forward process.
        text_encoder, tokenizer (*optional*): Where prompts are read.
        text_encoder_is_new (`bool`): Whether these two are new.
        condition_length (`int`): Positions of a prompt.
        convention (`str`): How prompts and small images are read, see [`PixelDiffusionPipeline`].
        teacher ([`~diffusers.UNet2DConditionModel`], *optional*): The U-Net to learn from.
        clip ([`~llamagen_hf.conditioning.cache.ImageFeatures`], *optional*): Embeds the images, in place of prompts.
    """

    unet: UNet2DConditionModel
    scheduler: DDPMScheduler
    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    text_encoder_is_new: bool
    condition_length: int
    convention: str
    teacher: UNet2DConditionModel | None
    clip: ImageFeatures | None


def build_models(
    config: DiffusionTrainingConfig, data: DataConfig, rows: Dataset | IterableDataset, device: torch.device
) -> DiffusionModels:
    """Build new models, or load those of `config.init_from` at the image size of the data.

    Args:
        config ([`DiffusionTrainingConfig`]): What to build or to load.
        data ([`~llamagen_hf.data.source.DataConfig`]): Says how large the images are.
        rows (`datasets.Dataset` or `datasets.IterableDataset`): Training rows, for the words of their captions.
        device (`torch.device`): Where a CLIP runs.

    Raises:
        ValueError: What is loaded does not fit the recipe.
    """
    start, teacher = (_load(config, name) for name in ("init_from", "teacher"))
    before = [pipe for pipe in (teacher, start) if pipe is not None]  # the first one says how prompts are read
    kinds = [pipe.scheduler.config.prediction_type for pipe in before]
    prediction_type = config.prediction_type or next(iter(kinds), "v_prediction")
    if other := [kind for kind in kinds if kind != prediction_type]:
        raise ValueError(
            f"prediction_type is {prediction_type!r}, but what is loaded predicts {other[0]!r}; leave it out."
        )
    scheduler = training_scheduler(prediction_type)
    for pipe in before:
        check_scheduler(scheduler, learns_variance(pipe.unet), pipe.scheduler)

    clip = None if config.clip is None else ImageFeatures(config.clip, device)
    length = (
        1
        if clip
        else config.condition_length or next((pipe.config.condition_length for pipe in before), CONDITION_LENGTH)
    )
    convention = next((pipe.config.convention for pipe in before), "own")
    text_encoder = tokenizer = None
    is_new = config.conditioning == "text" and config.text_encoder is None and clip is None and not before
    if is_new:
        captions = caption_corpus(rows, config.caption_templates, config.seed)
        tokenizer = train_text_tokenizer(captions, config.text_vocab_size, length)
        text_encoder = build_text_encoder(tokenizer, config.text_width, config.text_layers, config.text_heads)
    elif config.text_encoder is not None:
        text_encoder, tokenizer = load_text_encoder(config.text_encoder)
    elif config.conditioning == "text" and clip is None:
        text_encoder, tokenizer = before[0].text_encoder, before[0].tokenizer
        if text_encoder is None:
            raise ValueError(f"There is no text encoder at {config.teacher or config.init_from}; set text_encoder.")
    width = clip.dim if clip else text_encoder.config.hidden_size if text_encoder else None
    unet = _new_unet(config, data, width) if start is None else _at_size(start.unet, data.image_size)
    for source, loaded in (("init_from", unet), ("teacher", teacher and teacher.unet)):
        if loaded is not None and condition_dim(loaded) != width:
            raise ValueError(
                f"The {'embeddings of clip' if clip else 'text encoder states'} are {width} wide, but the U-Net of "
                f"{source} takes {condition_dim(loaded)}."
            )
    if clip and start is not None and start.config.condition_length != 1:
        raise ValueError(
            f"The pipeline of init_from reads {start.config.condition_length} positions, not an embedding."
        )
    return DiffusionModels(
        unet, scheduler, text_encoder, tokenizer, is_new, length, convention, teacher and teacher.unet, clip
    )


def _load(config: DiffusionTrainingConfig, name: str) -> PixelDiffusionPipeline | None:
    """The pipeline that a setting names, of the recipe's kind."""
    path = getattr(config, name)
    if path is None:
        return None
    try:
        pipe = PixelDiffusionPipeline.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"{name} can't be loaded: {error}") from error
    if upsamples(pipe.unet) != (config.low_image_size is not None):
        kind = "an upsampler; set low_image_size" if upsamples(pipe.unet) else "a base; leave low_image_size out"
        raise ValueError(f"The pipeline of {name} is {kind}.")
    if reads_text(pipe.unet) != (config.conditioning == "text"):
        kind = "text" if reads_text(pipe.unet) else "none"
        raise ValueError(f"The pipeline of {name} has conditioning {kind!r}, but the recipe {config.conditioning!r}.")
    return pipe


def _new_unet(config: DiffusionTrainingConfig, data: DataConfig, width: int | None) -> UNet2DConditionModel:
    is_upsampler = config.low_image_size is not None
    unet = efficient_unet(
        data.image_size,
        upsamples=is_upsampler,
        condition_dim=width,
        **config.sizes,
    )
    if is_upsampler:  # it starts from the enlarged image
        nn.init.zeros_(unet.conv_out.weight)
        nn.init.zeros_(unet.conv_out.bias)
    return unet


def _at_size(unet: UNet2DConditionModel, image_size: int) -> UNet2DConditionModel:
    """The U-Net for images of another size, with the same weights."""
    factor = size_factor(unet)
    if image_size % factor:
        raise ValueError(f"image_size is {image_size}; the U-Net of init_from takes multiples of {factor}.")
    unet.register_to_config(sample_size=image_size // patch_size(unet))
    return unet


def size_factor(unet: UNet2DConditionModel) -> int:
    """What the sides of its images are multiples of."""
    return patch_size(unet) * 2 ** (len(unet.config.block_out_channels) - 1)
