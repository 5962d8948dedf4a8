"""Coloured shapes to learn from, anywhere on white and of any size, and whether an image has a colour."""

import random
from pathlib import Path

import datasets
import torch
from PIL import Image, ImageDraw

from llamagen_hf.data.source import DataConfig


COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (10, 10, 10)}
SHAPES = ("circle", "square")


def draw_shape(color: str, shape: str, rng: random.Random, size: int = 16) -> Image.Image:
    """A shape somewhere on white, with smooth edges."""
    image = Image.new("RGB", (8 * size, 8 * size), "white")
    side = rng.randint(3 * size, 6 * size)
    left, top = rng.randint(0, 8 * size - side), rng.randint(0, 8 * size - side)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)((left, top, left + side, top + side), fill=COLORS[color])
    return image.resize((size, size), Image.Resampling.BOX)


def write_shapes_to_learn(folder: Path) -> DataConfig:
    """480 images of 16 pixels for training and 32 for testing, with captions of colour and shape."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for split, count in (("train", 480), ("test", 32)):
        names = [(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in range(count)]
        images = [draw_shape(*pair, rng) for pair in names]
        rows = {"image": images, "caption": [f"a {color} {shape}" for color, shape in names]}
        features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return DataConfig(str(folder), image_size=16)


def assert_drawn_in(color: str, images: torch.Tensor) -> None:
    """Each of the images `(batch, 3, height, width)` in [0, 1] has a shape, four fifths of it in that colour."""
    palette = torch.tensor([(255, 255, 255), *COLORS.values()]) / 255
    distance, nearest = (images[:, None] - palette[None, :, :, None, None]).square().sum(2).min(1)
    is_shape = (nearest != 0) & (distance < 0.1)  # the grey edges of a black shape are near to green
    drawn = (is_shape & (nearest == 1 + list(COLORS).index(color))).sum((1, 2))
    assert (drawn > 10).all(), (color, drawn)
    assert (drawn > 0.8 * is_shape.sum((1, 2))).all(), (color, drawn)
