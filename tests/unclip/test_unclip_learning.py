"""From coloured shapes to DALL-E 2: a CLIP, a prior and a decoder that draw what a prompt names, and variations."""

import random

import pytest
import torch
from tiny import generators
from tiny_clip import clip_config
from tiny_diffusion_training import diffusion_config
from tiny_unclip import prior_config


pytest.importorskip("datasets", reason="the training extra is not installed")

from shapes_to_learn import SHAPES, assert_drawn_in, draw_shape, write_shapes_to_learn  # noqa: E402

from llamagen_hf import EmbeddingPriorPipeline, PixelDiffusionPipeline, PriorDecoderPipeline  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_trainer import train_diffusion  # noqa: E402
from llamagen_hf.unclip.training.clip_trainer import train_clip  # noqa: E402
from llamagen_hf.unclip.training.prior_trainer import train_prior  # noqa: E402


pytestmark = pytest.mark.slow
NAMED = ("red", "green", "blue")  # a decoder of so few steps draws black as some grey
RUN = {"caption_templates": {"{caption}": 1.0}, "lr_scheduler": "cosine", "lr_warmup_steps": 10, "ema_decay": 0.98}
RUN |= dict.fromkeys(("checkpointing_steps", "eval_steps", "sample_steps"), 10_000) | {"log_steps": 50}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the three trainings returned, by name, and the pipeline of prior and decoder."""
    folder = tmp_path_factory.mktemp("unclip")
    data, clip = write_shapes_to_learn(folder / "shapes"), str(folder / "clip")
    of_clip = clip_config(
        folder / "clip", **RUN, patch_size=4, vision_width=32, vision_layers=2, text_width=32, projection_dim=16,
        max_train_steps=400, batch_size=32, learning_rate=3e-3,
    )  # fmt: skip
    of_prior = prior_config(
        folder / "prior", **RUN, clip=clip, num_layers=2, attention_head_dim=16, max_train_steps=200, batch_size=32,
        learning_rate=2e-3, eval_rows=32, sampling_defaults={"guidance_scale": 2.0},
    )  # fmt: skip
    of_decoder = diffusion_config(
        folder / "decoder", **RUN, clip=clip, condition_length=1, block_out_channels=[16, 32], snr_gamma=5.0,
        max_train_steps=400, batch_size=16, learning_rate=3e-3,
        sampling_defaults={"num_inference_steps": 12, "guidance_scale": 1.5},
    )  # fmt: skip
    metrics = {"clip": train_clip(data, of_clip), "prior": train_prior(data, of_prior)}
    metrics["decoder"] = train_diffusion(data, of_decoder)
    prior, decoder = EmbeddingPriorPipeline, PixelDiffusionPipeline
    pipe = PriorDecoderPipeline(prior.from_pretrained(folder / "prior"), decoder.from_pretrained(folder / "decoder"))
    pipe.set_progress_bar_config(disable=True)
    return metrics, pipe


def test_it_draws_the_colour_that_its_prompt_names(trained):
    _, pipe = trained
    for color in NAMED:
        prompts = [f"a {color} {shape}" for shape in SHAPES] * 2
        assert_drawn_in(color, pipe(prompts, generator=generators(0, 1, 2, 3), output_type="pt").images)


def test_the_prior_is_nearer_to_images_than_their_captions_are(trained):
    """Nearer, but no better at retrieval: what is drawn is one of many embeddings that fit a caption.

    Four of the 32 test images have the same caption, so either finds the right one for a quarter of them.
    """
    metrics = trained[0]["prior"]
    assert metrics["test_cosine"] > metrics["test_text_cosine"] + 0.03


def test_a_variation_is_nearest_to_its_image(trained):
    """The others are images of the same shape in the other two colours; sizes and places differ too."""
    _, pipe = trained
    rng, right = random.Random(5), []
    for seed, shape in enumerate(SHAPES * 2):
        images = [draw_shape(color, shape, rng) for color in NAMED]
        varied = pipe.variation(images, generator=generators(*range(3 * seed, 3 * seed + 3))).images
        nearest = (pipe.encode_image(varied) @ pipe.encode_image(images).T).argmax(-1)
        right += (nearest == torch.arange(3)).tolist()
    assert sum(right) >= 0.9 * len(right), right
