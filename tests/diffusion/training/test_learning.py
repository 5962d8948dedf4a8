"""From coloured shapes to a base that draws the colour of its prompt, and an upsampler that beats bicubic."""

import random

import pytest
import torch
from PIL import Image, ImageDraw
from tiny import generators
from tiny_diffusion_training import diffusion_config


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf import PixelDiffusionPipeline  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_trainer import train_diffusion  # noqa: E402


pytestmark = pytest.mark.slow
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "black": (10, 10, 10)}
RUN = {
    "block_out_channels": [32, 64],
    "batch_size": 16,
    "max_train_steps": 500,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "ema_decay": 0.99,
    "checkpointing_steps": 10_000,
    "log_steps": 100,
    "eval_steps": 10_000,
    "sample_steps": 10_000,
}


def draw_shape(color: str, shape: str, rng: random.Random, size: int) -> Image.Image:
    """A shape somewhere on white, with smooth edges."""
    image = Image.new("RGB", (8 * size, 8 * size), "white")
    side = rng.randint(3 * size, 6 * size)
    left, top = rng.randint(0, 8 * size - side), rng.randint(0, 8 * size - side)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)((left, top, left + side, top + side), fill=COLORS[color])
    return image.resize((size, size), Image.Resampling.BOX)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("shapes"), random.Random(0)
    for split, count in (("train", 480), ("test", 32)):
        names = [(rng.choice(list(COLORS)), rng.choice(("circle", "square"))) for _ in range(count)]
        images = [draw_shape(*pair, rng, 16) for pair in names]
        rows = {"image": images, "caption": [f"a {color} {shape}" for color, shape in names]}
        features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return DataConfig(str(folder), image_size=16)


@pytest.fixture(scope="module")
def base(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = diffusion_config(
        folder, **RUN, snr_gamma=5.0, text_pretrain_steps=100, text_width=32,
        caption_templates={"{caption}": 1.0}, text_vocab_size=300, sampling_defaults={"guidance_scale": 3.0},
    )  # fmt: skip
    return train_diffusion(shapes, config), PixelDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def upsampler(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upsampler")
    config = diffusion_config(
        folder, **RUN, conditioning="none", low_image_size=8, max_aug_level=0.5, random_flip=True, eval_images=32,
        eval_inference_steps=8,
    )  # fmt: skip
    return train_diffusion(shapes, config), PixelDiffusionPipeline.from_pretrained(folder)


def test_a_base_draws_the_colour_that_its_prompt_names(base):
    metrics, pipe = base
    assert metrics["test_loss_without_prompt"] > 1.2 * metrics["test_loss"]
    palette = torch.tensor([(255, 255, 255), *COLORS.values()]) / 255
    for index, color in enumerate(COLORS, start=1):
        prompts = [f"a {color} circle", f"a {color} square"] * 2
        images = pipe(prompts, generator=generators(0, 1, 2, 3), output_type="pt").images
        distance, nearest = (images[:, None] - palette[None, :, :, None, None]).square().sum(2).min(1)
        is_shape = (nearest != 0) & (distance < 0.1)  # the grey edges of a black shape are near to green
        drawn = (is_shape & (nearest == index)).sum((1, 2))
        assert (drawn > 10).all(), (color, drawn)
        assert (drawn > 0.8 * is_shape.sum((1, 2))).all(), (color, drawn)


def test_an_upsampler_beats_bicubic_enlargement(upsampler):
    metrics, _ = upsampler
    assert metrics["test_psnr"] > metrics["test_psnr_bicubic"] + 1
    assert metrics["test_ssim"] > metrics["test_ssim_bicubic"]


def test_level_0_keeps_the_small_image_and_level_1_does_not(upsampler):
    """The share of the small image's variance that the enlarged image, reduced again, explains."""
    _, pipe = upsampler
    rng = random.Random(9)
    small = [draw_shape(color, "square", rng, 8) for color in COLORS]
    kept = []
    for level in (0.0, 1.0):
        images = pipe(image=small, aug_level=level, generator=generators(0, 1, 2, 3), output_type="pt").images
        reduced = torch.nn.functional.interpolate(images, (8, 8), mode="area")
        given = (pipe.encode_image(small) + 1) / 2
        given = torch.nn.functional.interpolate(given, (8, 8), mode="area")
        kept.append(1 - ((reduced - given).square().sum() / (given - given.mean()).square().sum()).item())
    assert kept[0] > 0.9 and kept[1] < 0.5, kept
