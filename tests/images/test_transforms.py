"""Crops by their formulas, and the range of pixels."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen_hf.images.transforms import center_crop, random_crop, shifted_crop, ten_crop, to_tensor


SIZES = [(65, 130), (33, 47), (300, 129), (257, 511), (32, 32), (20, 31)]


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def scaled(image, shorter):
    """ADM's way to a shorter side: halved with a box filter while twice too large, then bicubic; as an array."""
    width, height = image.size
    while width >= 2 * shorter and height >= 2 * shorter:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    factor = shorter / (width if width < height else height)
    return np.array(image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC))


def middle(pixels, size):
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("size", SIZES)
def test_center_crop_by_its_formula(size):
    image = noise(*size)
    np.testing.assert_array_equal(np.array(center_crop(image, 32)), middle(scaled(image, 32), 32))


def test_a_image_twice_too_large_is_averaged():
    image = noise(64, 64)
    rows = (np.array(image).astype(int).reshape(64, 32, 2, 3).sum(2) + 1) // 2  # Pillow rounds after each direction
    np.testing.assert_array_equal(np.array(center_crop(image, 32)), (rows.reshape(32, 2, 32, 3).sum(1) + 1) // 2)


@pytest.mark.parametrize("size", SIZES)
def test_random_crop_by_its_formula(size):
    image = noise(*size)
    for seed in range(5):
        rng = random.Random(seed)
        pixels = scaled(image, rng.randrange(32, 41))  # 32 to 32 / 0.8
        top = rng.randrange(pixels.shape[0] - 31)
        left = rng.randrange(pixels.shape[1] - 31)
        crop = np.array(random_crop(image, 32, random.Random(seed)))
        np.testing.assert_array_equal(crop, pixels[top : top + 32, left : left + 32])


@pytest.mark.parametrize("crop_range, side", [(1.1, 35), (1.05, 34)])
@pytest.mark.parametrize("size", SIZES)
def test_shifted_crop_is_a_window_of_the_larger_centre_crop(size, crop_range, side):
    image = noise(*size)
    pixels = middle(scaled(image, side), side)
    places = [(y, x) for y in range(side - 31) for x in range(side - 31)]
    windows = {pixels[y : y + 32, x : x + 32].tobytes(): (y, x) for y, x in places}
    drawn = [np.array(shifted_crop(image, 32, crop_range, random.Random(seed))).tobytes() for seed in range(60)]
    assert {windows[crop] for crop in drawn} == set(places)
    again = [np.array(shifted_crop(image, 32, crop_range, random.Random(seed))).tobytes() for seed in range(60)]
    assert drawn == again


# The middle of torchvision's crops is rounded half to even.
@pytest.mark.parametrize("crop_range, side, center", [(1.1, 35, 2), (1.05, 33, 0), (1.2, 38, 3)])
@pytest.mark.parametrize("size", [(65, 130), (33, 47)])
def test_ten_crop_by_its_layout(size, crop_range, side, center):
    pixels = middle(scaled(noise(*size), side), side)
    far = side - 32
    expected = []
    for view in (pixels, pixels[:, ::-1]):
        for top, left in ((0, 0), (0, far), (far, 0), (far, far), (center, center)):
            expected.append(view[top : top + 32, left : left + 32])
    crops = ten_crop(noise(*size), 32, crop_range)
    np.testing.assert_array_equal(np.stack([np.array(crop) for crop in crops]), np.stack(expected))


def test_crops_leave_the_global_random_state_alone():
    state, torch_state = random.getstate(), torch.get_rng_state()
    random_crop(noise(65, 47), 32, random.Random(0))
    shifted_crop(noise(65, 47), 32, 1.1, random.Random(0))
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)


def test_pixels_lie_in_minus_one_to_one():
    image = Image.new("RGB", (2, 1))
    image.putdata([(255, 0, 128), (10, 20, 30)])
    tensor = to_tensor(image)
    assert tensor.shape == (3, 1, 2) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, -1.0, 128 / 127.5 - 1]))
