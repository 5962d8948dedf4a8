import numpy as np
import pytest
import torch
from PIL import Image
from tiny import generators

from llamagen_hf.images.transforms import center_crop


def noise(width=8, height=8, mode="RGB", seed=0):
    channels = len(mode)
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def codes_of(pipe, **arguments):
    return pipe(**{"generator": generators(0)[0], "output_type": "codes"} | arguments).images


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_kept_rows_are_the_images_and_the_rest_is_drawn(text_pipe, rows):
    picture = noise()
    own = text_pipe.encode_image(picture)
    codes = codes_of(text_pipe, prompt="apple", image=picture, keep_rows=rows)
    assert torch.equal(codes[:, :rows], own[:, :rows])
    assert not torch.equal(codes[:, rows:], own[:, rows:])
    again = codes_of(text_pipe, prompt="apple", image=picture, keep_rows=rows, generator=generators(1)[0])
    assert torch.equal(again[:, :rows], codes[:, :rows]) and not torch.equal(again, codes)


def test_completing_ones_own_drawing_with_its_seed_gives_it_back(class_pipe):
    drawn = codes_of(class_pipe, class_labels=3)
    for count in (0, 1, 7, 15):
        kept = class_pipe.variation(
            drawn, count, class_labels=3, generator=generators(0)[0], output_type="codes"
        ).images
        assert torch.equal(kept, drawn)


def test_a_variation_keeps_the_beginning_and_another_seed_changes_the_rest(class_pipe):
    drawn = class_pipe(class_labels=[3, 4], generator=generators(0, 1))
    other = class_pipe.variation(drawn.codes, 6, class_labels=[3, 4], generator=generators(8, 9))
    before, after = drawn.codes.flatten(1), other.codes.flatten(1)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[0, 6:], after[0, 6:]) and not torch.equal(before[1, 6:], after[1, 6:])
    single = class_pipe.variation(drawn.codes[1], 6, class_labels=4, generator=generators(9))
    assert torch.equal(single.codes[0], other.codes[1])


def test_one_image_for_all_or_one_for_each(class_pipe):
    pictures = [noise(seed=0), noise(seed=1)]
    own = class_pipe.encode_image(pictures)
    both = codes_of(class_pipe, class_labels=[1, 2], image=pictures, keep_rows=2, num_images_per_prompt=2)
    assert torch.equal(both[:, :2], own[[0, 0, 1, 1], :2])
    every = codes_of(class_pipe, class_labels=1, image=pictures, keep_rows=2, num_images_per_prompt=2)
    assert torch.equal(every[:, :2], own[:, :2])
    one = codes_of(class_pipe, class_labels=[1, 2], image=pictures[1], keep_rows=2)
    assert torch.equal(one[:, :2], own[[1, 1], :2])


def test_a_tensor_is_the_image_that_it_holds(class_pipe):
    picture = noise()
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    assert torch.equal(class_pipe.encode_image(tensor), class_pipe.encode_image(picture))


def test_images_of_any_kind_become_upright_rgb_squares(class_pipe):
    plain = noise(24, 16)
    cropped = class_pipe.encode_image(center_crop(plain, 8))
    assert torch.equal(class_pipe.encode_image(plain), cropped)
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6  # "rotate by 90 degrees clockwise to show"
    assert torch.equal(class_pipe.encode_image(turned), cropped)
    transparent = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(
        class_pipe.encode_image(transparent), class_pipe.encode_image(Image.new("RGB", (8, 8), "white"))
    )
    for mode in ("L", "1", "CMYK", "P", "LA", "I;16"):
        assert class_pipe.encode_image(Image.new(mode, (5, 9))).shape == (1, 4, 4)
    assert class_pipe.encode_image(Image.new("RGB", (1, 1))).shape == (1, 4, 4)


def test_a_very_long_image_is_cropped_before_it_is_scaled():
    strip = center_crop(Image.new("RGB", (1, 60000), "red"), 512)
    assert strip.size == (512, 512) and strip.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"keep_rows": 2}, "`keep_rows` says how much of `image`"),
        ({"image": noise(), "keep_rows": 4}, "`keep_rows` is 4; .*expected an integer from 0 to 3"),
        ({"image": noise(), "keep_rows": -1}, "`keep_rows` is -1"),
        ({"image": noise(), "keep_rows": 1.5}, "`keep_rows` is 1.5"),
        ({"image": noise()}, "`keep_rows` is None"),
        ({"image": "cat.png", "keep_rows": 1}, "must be a PIL image, a list of them or a tensor, not str"),
        ({"image": [], "keep_rows": 1}, "holds 0 images, but 1 are needed"),
        ({"image": [noise()] * 3, "keep_rows": 1}, "holds 3 images, but 1 are needed"),
        ({"image": torch.zeros(1, 3, 4, 4), "keep_rows": 1}, r"has shape \(1, 3, 4, 4\); expected \(batch, 3, 8, 8\)"),
        ({"image": torch.full((1, 3, 8, 8), -1.0), "keep_rows": 1}, r"must be in \[0, 1\]"),
        ({"image": noise(), "keep_rows": 1, "prefix_codes": torch.zeros(1, 2).long()}, "not both"),
        ({"prefix_codes": torch.zeros(1, 2)}, "must be an integer tensor"),
        ({"prefix_codes": torch.zeros(1, 16).long()}, r"expected 1 rows of fewer than 16 codes"),
        ({"prefix_codes": torch.zeros(2, 4).long()}, r"expected 1 rows"),
        ({"prefix_codes": torch.full((1, 4), 64)}, r"holds 64..64; expected 0..63"),
    ],
)
def test_wrong_starts_are_refused_in_a_sentence(class_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        class_pipe(class_labels=1, **arguments)


@pytest.mark.parametrize("count", [-1, 16, 2.0])
def test_a_variation_must_leave_something_to_draw(class_pipe, count):
    with pytest.raises(ValueError, match="`keep_codes` is .*expected an integer from 0 to 15"):
        class_pipe.variation(torch.zeros(4, 4).long(), count, class_labels=1)


@pytest.mark.parametrize(
    "codes, found",
    [
        (torch.zeros(3, 3).long(), r"of shape \(3, 3\)"),
        (torch.zeros(1, 16).long(), r"of shape \(1, 16\)"),
        ([[0] * 4] * 4, "list"),
    ],
)
def test_a_variation_needs_a_grid(class_pipe, codes, found):
    with pytest.raises(ValueError, match=f"`codes` is {found}; expected a tensor of shape"):
        class_pipe.variation(codes, 3, class_labels=1)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_codes_decode_to_the_images_that_were_drawn(class_pipe, output_type):
    drawn = class_pipe(class_labels=[1, 2], generator=generators(0, 1), output_type=output_type)
    pictures = class_pipe.decode_codes(drawn.codes, output_type)
    assert np.array_equal(np.stack(list(map(np.asarray, pictures))), np.stack(list(map(np.asarray, drawn.images))))
