"""Rows of a diffusion training: everything random about a row is decided by the row, and windows lie on a grid."""

import random

import pytest
import torch
from tiny import build_vq_model
from tiny_diffusion_training import UPSAMPLER, diffusion_config
from tiny_training import draw_shape


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.data.captions import Captions  # noqa: E402
from llamagen_hf.data.samples import ImageSamples  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_samples import DiffusionCollator, DiffusionSamples  # noqa: E402
from llamagen_hf.diffusion.training.diffusion_trainer import cut_windows, row_noise  # noqa: E402
from llamagen_hf.diffusion.training.small_images import SmallImages  # noqa: E402
from llamagen_hf.images.transforms import center_crop, to_tensor  # noqa: E402


IMAGES = ImageSamples(DataConfig("shapes", image_size=16))
ROWS = datasets.Dataset.from_dict({"image": [draw_shape(i) for i in range(4)], "caption": ["one", "two", "three", ""]})


def samples_of(captions=True, **kwargs):
    options = {name: kwargs.pop(name) for name in ("grid", "training", "without_prompt") if name in kwargs}
    return DiffusionSamples(
        IMAGES, Captions(ROWS, {"{caption}": 1.0}) if captions else None, diffusion_config("out", **kwargs), **options
    )


def test_captions_are_dropped_at_their_rate_and_never_in_tests():
    def share(**kwargs):
        samples = samples_of(condition_dropout=0.25, **kwargs)
        return sum(samples(ROWS[0], random.Random(i))["caption"] == "" for i in range(800)) / 800

    assert 0.2 < share() < 0.3
    assert share(training=False) == 0
    assert share(training=False, without_prompt=True) == 1


def test_a_test_row_has_the_same_draws_wherever_it_is_read():
    samples = samples_of(training=False, **UPSAMPLER, max_aug_level=0.5)
    one, again, other = (samples(ROWS[i], random.Random(seed)) for i, seed in ((0, 1), (0, 2), (1, 1)))
    for name in ("seeds", "timesteps", "aug_levels", "redrawn"):
        assert one[name] == again[name], name
    assert one["seeds"] != other["seeds"] and "crops" not in one
    without = samples_of(training=False, without_prompt=True, **UPSAMPLER)(ROWS[0], random.Random(1))
    assert one["seeds"] == without["seeds"] and one["timesteps"] == without["timesteps"]


def test_levels_shares_and_windows_are_those_of_the_recipe():
    config = {"max_aug_level": 0.4, "low_vq_model": "emoji", "low_vq_share": 0.3, "crop_size": 8}
    samples = samples_of(captions=False, grid=4, **UPSAMPLER, **config)
    drawn = [samples(ROWS[0], random.Random(i)) for i in range(600)]
    levels = torch.tensor([sample["aug_levels"] for sample in drawn])
    assert 0 <= levels.min() < 0.02 and 0.38 < levels.max() <= 0.4
    assert 0.25 < sum(sample["redrawn"] for sample in drawn) / 600 < 0.35
    assert {sample["crops"] for sample in drawn} == {(top, left) for top in (0, 4, 8) for left in (0, 4, 8)}
    steps = torch.tensor([sample["timesteps"] for sample in drawn])
    assert 0 <= steps.min() < 20 and 980 < steps.max() < 1000


def test_a_batch_is_what_its_samples_are():
    samples = samples_of(**UPSAMPLER, crop_size=8)
    rows = [samples(ROWS[i], random.Random(i)) for i in range(2)]
    tokens = (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    batch = DiffusionCollator(lambda captions: tokens)(rows)
    assert batch["images"].shape == (2, 3, 16, 16) and batch["crops"].shape == (2, 2)
    assert batch["seeds"].dtype == torch.long and batch["redrawn"].dtype == torch.bool
    assert batch["input_ids"] is tokens[0] and "caption" not in batch


def test_the_noise_of_a_row_is_its_own():
    seeds = torch.tensor([2**62, 5, 7])
    noise = row_noise(seeds, (2, 3, 4, 4), seeds)
    assert noise.shape == (3, 2, 3, 4, 4)
    for row, seed in enumerate(seeds):
        assert torch.equal(noise[row], row_noise(seed[None], (2, 3, 4, 4), seeds)[0])


def test_windows_are_cut_where_they_lie():
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    cut = cut_windows(images, torch.tensor([[0, 2], [3, 1]]), 3)
    assert torch.equal(cut[0], images[0, :, :3, 2:5]) and torch.equal(cut[1], images[1, :, 3:, 1:4])


def test_small_images_are_those_that_a_base_was_trained_on():
    image = draw_shape(0).resize((32, 32))
    expected = to_tensor(center_crop(image, 16))
    torch.testing.assert_close(SmallImages(16, 32).reduce(to_tensor(image)[None])[0], expected, rtol=0, atol=0.01)


def test_some_small_images_are_redrawn(tmp_path):
    build_vq_model().save_pretrained(tmp_path)
    small_images, images = SmallImages(8, 16, str(tmp_path)), torch.rand(3, 3, 16, 16) * 2 - 1
    small = small_images(images, torch.tensor([False, True, False]))
    reduced = small_images.reduce(images)
    assert torch.equal(small[::2], reduced[::2])
    torch.testing.assert_close(small[1:2], small_images.redraw(reduced[1:2]))
    assert (small[1] - reduced[1]).abs().max() > 0.1 and small.abs().max() <= 1
    with pytest.raises(ValueError, match="low_image_size is 6; expected a part of image_size"):
        SmallImages(6, 16)
    with pytest.raises(ValueError, match="low_image_size is 3, but low_vq_model takes multiples of 2"):
        SmallImages(3, 6, str(tmp_path))
