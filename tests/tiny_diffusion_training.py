"""Tiny recipes of pixel diffusion, for the datasets of `tiny_training`."""

from pathlib import Path

from llamagen_hf.diffusion.training.classifier_config import ClassifierTrainingConfig
from llamagen_hf.diffusion.training.diffusion_config import DiffusionTrainingConfig


UPSAMPLER = {"conditioning": "none", "low_image_size": 8}


UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": [1, 1],
    "attention_levels": [1],
    "attention_head_dim": 8,
}
RUN = {
    "max_train_steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 2,
    "checkpointing_steps": 3,
    "log_steps": 2,
    "eval_steps": 3,
    "sample_steps": 6,
}


def diffusion_config(folder: Path, **kwargs) -> DiffusionTrainingConfig:
    """A base that learns its text encoder along, unless `kwargs` say otherwise, such as [`UPSAMPLER`]'s."""
    settings = {
        "condition_length": 12,
        "text_vocab_size": 270,
        "text_width": 16,
        "text_layers": 1,
        "text_heads": 2,
        "caption_templates": {"{caption}": 1.0, "{tags}": 1.0, "{shape}": 0.5},
        "eval_images": 4,
        "eval_inference_steps": 2,
        "sampling_defaults": {"num_inference_steps": 2},
    }
    return DiffusionTrainingConfig(output_dir=str(folder), **UNET | RUN | settings | kwargs)


def classifier_config(folder: Path, **kwargs) -> ClassifierTrainingConfig:
    """A classifier of shapes."""
    settings = {"class_column": "shape", "dropout": 0.0}
    return ClassifierTrainingConfig(output_dir=str(folder), **UNET | RUN | settings | kwargs)
