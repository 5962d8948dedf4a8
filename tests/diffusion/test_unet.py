"""The Efficient U-Net: what is read off its configuration, its patches, its text and its sizes."""

import pytest
import torch
from tiny_diffusion import build_unet

from llamagen_hf.diffusion.unet import (
    condition_dim,
    efficient_unet,
    from_patches,
    image_size,
    learns_variance,
    patch_size,
    predict,
    reads_text,
    to_patches,
    upsamples,
)


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize("enlarges", [False, True])
@pytest.mark.parametrize("dim", [None, 6])
def test_what_a_unet_does_is_read_off_its_configuration(side, enlarges, dim):
    unet = build_unet(upsamples=enlarges, condition_dim=dim, patch_size=side)
    assert (patch_size(unet), upsamples(unet), condition_dim(unet), image_size(unet)) == (side, enlarges, dim, 16)
    assert reads_text(unet) == (dim is not None) and not learns_variance(unet)
    given = {"states": torch.randn(2, 1, dim), "mask": torch.ones(2, 1)} if dim else {}
    if enlarges:
        given |= {"small": torch.randn(2, 3, 16, 16), "aug_level": torch.tensor([0.0, 1.0])}
    with torch.no_grad():
        assert predict(unet, torch.randn(2, 3, 16, 16), 10, **given).shape == (2, 3, 16, 16)


def test_patches_come_back():
    images = torch.randn(2, 3, 8, 8)
    assert to_patches(images, 4).shape == (2, 48, 2, 2)
    assert torch.equal(from_patches(to_patches(images, 4), 4), images)


def test_most_blocks_are_at_low_resolution_and_the_full_one_may_have_none():
    unet = build_unet(layers_per_block=(0, 2))
    assert [len(block.resnets) for block in unet.down_blocks] == [0, 2]
    assert unet.config.resnet_out_scale_factor == pytest.approx(2**0.5)
    assert unet.config.resnet_time_scale_shift == "scale_shift"


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 16, 64])  # as many as an attended level has positions: 8 x 8 after one halving
def test_what_stands_in_padding_changes_nothing(length):
    unet, images = build_unet(condition_dim=6), torch.randn(1, 3, 16, 16)
    # Zeroed states count in the pooled text, which is the same for all; the attention must not see them.
    states, mask = torch.randn(1, length, 6), (torch.arange(length) < 3)[None].long()
    unet.add_embedding.forward = lambda states: torch.zeros(1, 32)
    one = predict(unet, images, 10, states=states, mask=mask)
    other = predict(unet, images, 10, states=torch.where(mask[..., None] == 1, states, 9.0), mask=mask)
    assert torch.equal(one, other)
    changed = predict(unet, images, 10, states=states + 1, mask=mask)
    assert not torch.equal(one, changed)


@torch.no_grad()
def test_the_level_of_noise_and_the_small_image_change_the_prediction():
    unet, images = build_unet(upsamples=True), torch.randn(2, 3, 16, 16)

    def call(small, level):
        return predict(unet, images, 10, small=small, aug_level=torch.tensor([level, level]))

    assert not torch.equal(call(images, 0.0), call(images, 0.9))
    assert not torch.equal(call(images, 0.0), call(-images, 0.0))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"patch_size": 3}, "`patch_size` is 3; expected 1, 2 or 4."),
        ({"image_size": 18, "patch_size": 2}, "`image_size` is 18; .* expected a multiple of 4."),
        ({"layers_per_block": (1,)}, "`layers_per_block` has 1 numbers"),
        ({"layers_per_block": (1, 0)}, "only the first level may have 0"),
        ({"attention_levels": (2,)}, "expected numbers from 0 to 1"),
        ({"attention_head_dim": 5}, "`attention_head_dim` is 5, which does not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    sizes = {"block_out_channels": (8, 16), "layers_per_block": (1, 1), "attention_levels": (1,)}
    with pytest.raises(ValueError, match=message):
        efficient_unet(**{"image_size": 16, "attention_head_dim": 8} | sizes | wrong)
