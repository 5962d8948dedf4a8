"""From coloured shapes to a base that draws the colour of its prompt, and an upsampler that beats bicubic."""

import random

import pytest
import torch
from tiny import generators
from tiny_diffusion_training import diffusion_config


pytest.importorskip("datasets", reason="the training extra is not installed")

from shapes_to_learn import COLORS, assert_drawn_in, draw_shape, write_shapes_to_learn  # noqa: E402

from llamagen_hf import PixelDiffusionPipeline  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_trainer import train_diffusion  # noqa: E402


pytestmark = pytest.mark.slow
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


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes_to_learn(tmp_path_factory.mktemp("shapes"))


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
    for color in COLORS:
        prompts = [f"a {color} circle", f"a {color} square"] * 2
        assert_drawn_in(color, pipe(prompts, generator=generators(0, 1, 2, 3), output_type="pt").images)


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
