"""Images of rows: any mode, upright, and what is said of those that can't be used."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")


from llamagen_hf.data.samples import BadRow, BadRows, decode_image  # noqa: E402
from llamagen_hf.images.transforms import to_tensor  # noqa: E402


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return {"bytes": buffer.getvalue(), "path": None}


def palette_image():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    return image


def grey_16_bit(mode, value):
    return Image.fromarray(np.full((2, 2), value, {"I;16": np.uint16, "I": np.int32}[mode]))


@pytest.mark.parametrize(
    "image, format, options, color",
    [
        (Image.new("RGBA", (2, 2), (200, 100, 0, 0)), "PNG", {}, (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (200, 100, 0, 51)), "PNG", {}, (244, 224, 204)),  # a fifth of it
        (Image.new("LA", (2, 2), (0, 102)), "PNG", {}, (153, 153, 153)),
        (palette_image(), "PNG", {"transparency": 1}, (255, 255, 255)),
        (palette_image(), "PNG", {}, (0, 0, 255)),
        (Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (Image.new("L", (2, 2), 7), "PNG", {}, (7, 7, 7)),
        (Image.new("1", (2, 2), 1), "PNG", {}, (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 0, 255, 0)), "TIFF", {}, (255, 255, 0)),
        (grey_16_bit("I;16", 65535), "PNG", {}, (255, 255, 255)),
        (grey_16_bit("I;16", 100 * 257 + 100), "PNG", {}, (100, 100, 100)),
        (grey_16_bit("I", 100 * 257), "TIFF", {}, (100, 100, 100)),
    ],
)
def test_images_of_any_mode_become_rgb_on_white(image, format, options, color):
    decoded = decode_image(encoded(image, format, **options))
    assert decoded.mode == "RGB" and decoded.getpixel((1, 1)) == color
    if not options:
        assert decode_image(image).getpixel((1, 1)) == color
        torch.testing.assert_close(to_tensor(image)[:, 1, 1], torch.tensor(color) / 127.5 - 1)


def test_images_are_turned_upright():
    image, exif = noise(5, 3), Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    value = encoded(image, exif=exif)
    expected = np.rot90(np.array(image), -1)
    np.testing.assert_array_equal(np.array(decode_image(value)), expected)
    np.testing.assert_array_equal(np.array(decode_image(Image.open(io.BytesIO(value["bytes"])))), expected)


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "no image"),
        ({"bytes": None, "path": None}, "no image"),
        ({"bytes": None, "path": "absent.png"}, "no image: there is no file absent.png"),
        ({"bytes": b"GIF, or so they say", "path": None}, "image can't be decoded: no known format"),
        ({"bytes": encoded(noise(40, 40))["bytes"][:2000], "path": None}, "image can't be decoded: .*truncated"),
        (encoded(noise(20, 16)), "image too small: it is 20x16 pixels, the shorter side must be at least 17"),
    ],
)
def test_unusable_images_say_why(value, reason):
    with pytest.raises(BadRow, match=f"^{reason}"):
        decode_image(value, min_size=17)


def test_bad_rows_are_counted_once_up_to_the_limit(caplog):
    bad = BadRows(limit=3)
    bad.add(4, "image too small: 3x3")
    bad.add(4, "image too small: 3x3")
    bad.add(4, "no image", split="test")
    bad.add(7, "image too small: 5x3")
    assert [record.message for record in caplog.records] == [
        "Can't use row 4: image too small: 3x3.",
        "Can't use row 4 of test: no image.",
        "Can't use row 7: image too small: 5x3.",
    ]
    assert bad.report() == {"image too small": 2, "no image": 1} and len(bad) == 3

    resumed = BadRows(limit=3)
    resumed.load_state_dict(json.loads(json.dumps(bad.state_dict())))
    assert resumed.report() == bad.report()
    resumed.add(7, "image too small: 5x3")
    with pytest.raises(
        ValueError, match="4 row.s. can't be used, more than max_bad_rows .3. allows; the last: row 8: no"
    ):
        resumed.add(8, "no caption")
