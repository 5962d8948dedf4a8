"""Tiny datasets and recipes: every stage in a second or two."""

from pathlib import Path

import datasets
from PIL import Image, ImageDraw

from llamagen_hf.data.source import DataConfig
from llamagen_hf.llamagen.training.extraction import CodeExtractionConfig, extract_codes
from llamagen_hf.llamagen.training.generator_config import GeneratorTrainingConfig
from llamagen_hf.llamagen.training.vq_config import TokenizerTrainingConfig
from llamagen_hf.llamagen.training.vq_trainer import train_tokenizer


COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (0, 0, 0)}
SHAPES = ("circle", "square")


def draw_shape(i: int) -> Image.Image:
    image = Image.new("RGB", (20, 16), "white")
    draw = ImageDraw.Draw(image)
    shape = draw.ellipse if i % 2 == 0 else draw.rectangle
    shape((4 + i % 3, 3, 14, 13), fill=list(COLORS.values())[i % 4])
    return image


def write_shapes(folder: Path, train: int = 20, test: int = 8) -> DataConfig:
    """Coloured circles and squares on white as Parquet, with captions, tags and classes."""
    for split, count in (("train", train), ("test", test)):
        names = [(list(COLORS)[i % 4], SHAPES[i % 2]) for i in range(count)]
        rows = {
            "image": [draw_shape(i) for i in range(count)],
            "caption": [f"a {color} {shape}" for color, shape in names],
            "tags": [list(pair) for pair in names],
            "shape": [SHAPES.index(shape) for _, shape in names],
        }
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "caption": datasets.Value("string"),
                "tags": datasets.List(datasets.Value("string")),
                "shape": datasets.ClassLabel(names=list(SHAPES)),
            }
        )
        rows = datasets.Dataset.from_dict(rows, features=features)
        for shard in range(2):  # two files, so that two workers have something to read of a stream
            rows.shard(2, shard).to_parquet(folder / f"{split}-{shard:05d}-of-00002.parquet")
    return DataConfig(dataset=str(folder), image_size=16)


def write_codes(folder: Path) -> DataConfig:
    """A tokenizer and codes below `folder`, for a generator to learn from."""
    data = write_shapes(folder / "shapes")
    train_tokenizer(data, tokenizer_config(folder / "tokenizer", max_train_steps=2))
    extract_codes(data, CodeExtractionConfig(str(folder / "tokenizer"), str(folder / "codes"), num_crops=2))
    return data


def tokenizer_config(folder: Path, **kwargs) -> TokenizerTrainingConfig:
    settings = {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 32,
        "max_train_steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "perceptual_weight": 0.0,
        "discriminator": None,
        "gradient_weight": 1.0,
        "revive_until_step": 6,
        "revive_every": 2,
        "checkpointing_steps": 3,
        "log_steps": 2,
        "eval_steps": 3,
        "sample_steps": 3,
    }
    return TokenizerTrainingConfig(output_dir=str(folder), **settings | kwargs)


def generator_config(folder: Path, vq_model: Path, codes: Path, **kwargs) -> GeneratorTrainingConfig:
    settings = {
        "conditioning": "text",
        "caption_templates": {"{caption}": 1.0, "{tags}": 1.0, "{shape}": 0.5},
        "label_column": "shape",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "condition_length": 8,
        "text_vocab_size": 270,
        "text_width": 16,
        "text_layers": 1,
        "text_heads": 2,
        "max_train_steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 3,
        "log_steps": 2,
        "eval_steps": 3,
        "sample_steps": 6,
        "sampling_defaults": {"guidance_scale": 2.0},
    }
    paths = {"output_dir": str(folder), "codes_dir": str(codes), "vq_model": str(vq_model)}
    return GeneratorTrainingConfig(**paths | settings | kwargs)
