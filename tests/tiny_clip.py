"""Tiny recipes of CLIP, for the datasets of `tiny_training`."""

from pathlib import Path

from llamagen_hf.unclip.training.clip_config import CLIPTrainingConfig


def clip_config(folder: Path, **kwargs) -> CLIPTrainingConfig:
    settings = {
        "patch_size": 8,
        "vision_width": 16,
        "vision_layers": 1,
        "vision_heads": 2,
        "text_vocab_size": 540,
        "text_width": 16,
        "text_layers": 1,
        "text_heads": 2,
        "text_length": 12,
        "projection_dim": 8,
        "caption_templates": {"{caption}": 1.0, "{tags}": 1.0, "{shape}": 0.5},
        "max_train_steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 3,
        "log_steps": 2,
        "eval_steps": 3,
        "sample_steps": 6,
    }
    return CLIPTrainingConfig(output_dir=str(folder), **settings | kwargs)
