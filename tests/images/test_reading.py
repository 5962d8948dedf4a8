"""One reader of images for every part of the package: odd images give everyone the same pixels."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from tiny import build_clip

from llamagen_hf.clip import embed_images
from llamagen_hf.images.reading import UnreadableImage, read_image
from llamagen_hf.images.transforms import to_tensor


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.data.samples import ImageSamples  # noqa: E402
from llamagen_hf.data.shards import decode_batches  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.evaluation.images import open_images  # noqa: E402


SIDE = 8


def encoded(image, format="PNG", **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def plain(color=(200, 30, 60)):
    return Image.new("RGB", (SIDE, SIDE), color)


def full(value, dtype):
    return Image.fromarray(np.full((SIDE, SIDE), value, dtype))


def png(color_type, depth, pixel, transparent):
    """A PNG of one colour with a `tRNS` chunk, of sorts that Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, color_type, 0, 0, 0))
    rows = zlib.compress((b"\0" + pixel * SIDE) * SIDE)
    chunks = header + chunk(b"tRNS", transparent) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def palette_with_alpha():
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return encoded(image, transparency=bytes([255, 51]))


def swapped_profile():
    """The profile of sRGB with the primaries of red and green exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"----", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"----", b"gXYZ", 1)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BROKEN_EXIF = (
    b"b'II*\\x00\\x08'",
    b"Exif\0\0b'MM\\x00*'",
    bytes(40),
    b"Exif\0\0" + bytes(40),
    b"x",
    b"II*\0\xff\xff\xff\xff",
)
RED_UP = Image.fromarray(np.repeat(np.array([[[255, 0, 0]], [[0, 0, 255]]], np.uint8), 4, 0).repeat(SIDE, 1))
RED_LEFT = RED_UP.transpose(Image.Transpose.ROTATE_90)
ORIENTED = Image.Exif()
ORIENTED[274] = 6  # to be turned a quarter clockwise
HALF_BROKEN = b"MM\0*\0\0\0\x08\0\x02" + struct.pack(">HHIHHHHII", 274, 3, 1, 6, 0, 40091, 12, 2**32 - 1, 0)

# Content of a file, and the colour of its upper left pixel.
ODD = {
    "rgba.png": (encoded(Image.new("RGBA", (SIDE, SIDE), (200, 100, 0, 51))), (244, 224, 204)),
    "clear.webp": (encoded(Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 0)), "WEBP", lossless=True), (255, 255, 255)),
    "la.png": (encoded(Image.new("LA", (SIDE, SIDE), (0, 102))), (153, 153, 153)),
    "palette.png": (palette_with_alpha(), (204, 204, 255)),
    "rgb-trns.png": (encoded(plain((1, 2, 3)), transparency=(1, 2, 3)), (255, 255, 255)),
    "grey-trns.png": (encoded(Image.new("L", (SIDE, SIDE), 7), transparency=7), (255, 255, 255)),
    "one-bit.png": (encoded(Image.new("1", (SIDE, SIDE), 1)), (255, 255, 255)),
    "grey-16.png": (encoded(full(40000, np.uint16)), (156, 156, 156)),
    "grey-16.tif": (encoded(full(40000, np.uint16), "TIFF"), (156, 156, 156)),
    "grey-16-big.tif": (encoded(Image.frombytes("I;16B", (SIDE, SIDE), b"\x9c\x40" * 64), "TIFF"), (156, 156, 156)),
    "grey-16-trns.png": (png(0, 16, b"\x9c\x40", b"\x9c\x40"), (255, 255, 255)),
    "rgb-16-trns.png": (png(2, 16, b"\x9c\x40\0\0\0\0", b"\0\0\0\0\0\1"), (156, 0, 0)),
    "grey-16.pgm": (b"P5 8 8 65535\n" + b"\0\xff" * 64, (1, 1, 1)),
    "int32-of-16-bits.tif": (encoded(full(25700, np.int32), "TIFF"), (100, 100, 100)),
    "int32-of-8-bits.tif": (encoded(full(100, np.int32), "TIFF"), (100, 100, 100)),
    "float-shares.tif": (encoded(full(0.4, np.float32), "TIFF"), (102, 102, 102)),
    "float-overshoot.tif": (encoded(full(1.02, np.float32), "TIFF"), (255, 255, 255)),
    "float-of-8-bits.tif": (encoded(full(102.4, np.float32), "TIFF"), (102, 102, 102)),
    "cmyk.tif": (encoded(Image.new("CMYK", (SIDE, SIDE), (0, 0, 255, 0)), "TIFF"), (255, 255, 0)),
    "lab.tif": (encoded(Image.new("LAB", (SIDE, SIDE), (255, 128, 128)), "TIFF"), (254, 255, 254)),
    "first-frame.gif": (
        encoded(plain((255, 0, 0)), "GIF", save_all=True, append_images=[plain((0, 255, 0))]), (255, 0, 0)
    ),
    "first-page.tif": (encoded(plain(), "TIFF", save_all=True, append_images=[plain((0, 0, 0))]), (200, 30, 60)),
    "upright.png": (encoded(RED_LEFT, exif=ORIENTED), (255, 0, 0)),
    "upright.webp": (encoded(RED_LEFT, "WEBP", lossless=True, exif=ORIENTED), (255, 0, 0)),
    "upright-though-broken.png": (encoded(RED_LEFT, exif=HALF_BROKEN), (255, 0, 0)),
    "swapped.png": (encoded(plain((255, 0, 0)), icc_profile=swapped_profile()), (0, 255, 0)),
    "swapped-clear.png": (
        encoded(Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 51)), icc_profile=swapped_profile()), (204, 255, 204)
    ),
    "srgb.png": (encoded(plain(), icc_profile=SRGB), (200, 30, 60)),
    "broken-profile.png": (encoded(plain(), icc_profile=b"no profile"), (200, 30, 60)),
    "profile-of-others.png": (encoded(Image.new("L", (SIDE, SIDE), 7), icc_profile=SRGB), (7, 7, 7)),
    **{f"exif-{i}.png": (encoded(plain(), exif=exif), (200, 30, 60)) for i, exif in enumerate(BROKEN_EXIF)},
    **{
        f"exif-{i}.webp": (encoded(plain(), "WEBP", lossless=True, exif=exif), (200, 30, 60))
        for i, exif in enumerate(BROKEN_EXIF)
    },
    **{
        f"exif-{i}.jpg": (encoded(plain((128, 128, 128)), "JPEG", exif=exif, dpi=(72, 72)), (128, 128, 128))
        for i, exif in enumerate(BROKEN_EXIF)
    },
}  # fmt: skip
NAMES = sorted(ODD)
WHOLE = encoded(Image.effect_noise((64, 64), 90))
UNREADABLE = {
    "cut.png": WHOLE[: len(WHOLE) // 2],
    "empty.png": b"",
    "text.png": b"no image at all",
    "header.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "cut.gif": encoded(plain(), "GIF")[:30],
    "cut.webp": encoded(plain(), "WEBP")[:-9],
    "cut.tif": encoded(plain(), "TIFF")[:60],
    "nan.tif": encoded(full(np.nan, np.float32), "TIFF"),
    "negative.tif": encoded(full(-1, np.float32), "TIFF"),
    "photo.heic": b"\0\0\0\x18ftypheic" + bytes(40),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    for name in NAMES:
        (folder / name).write_bytes(ODD[name][0])
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_image_has_the_pixels_that_it_shows(folder, name):
    content, color = ODD[name]
    with Image.open(io.BytesIO(content)) as opened:
        for source in (folder / name, str(folder / name), io.BytesIO(content), opened):
            image = read_image(source)
            assert (image.mode, image.size, image.info) == ("RGB", (SIDE, SIDE), {})
            assert image.getpixel((0, 0)) == color
    assert read_image(image).tobytes() == image.tobytes()  # nothing is done twice


def test_every_entry_gives_the_same_pixels(folder, class_pipe):
    expected = [read_image(folder / name) for name in NAMES]
    pixels = [np.array(image) for image in expected]

    # The columns of datasets, by bytes and by path: training, extraction, recaptioning, scoring.
    cells = [{"bytes": ODD[name][0], "path": None} for name in NAMES]
    paths = [{"bytes": None, "path": str(folder / name)} for name in NAMES]
    make = ImageSamples(DataConfig("", image_size=SIDE))
    for rows in (cells, paths):
        samples = [make({"image": row}, random.Random(0))["images"] for row in rows]
        assert torch.equal(torch.stack(samples), torch.stack([to_tensor(image) for image in expected]))
        (batch,) = decode_batches(rows, range(len(NAMES)), 1000)
        assert batch[0] == list(range(len(NAMES)))
        assert all(np.array_equal(image, value) for image, value in zip(batch[1], pixels, strict=True))

    # Evaluation: a folder, a list, a dataset.
    opened = [Image.open(io.BytesIO(ODD[name][0])) for name in NAMES]
    dataset = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features(image=datasets.Image()))
    for source in (folder, opened, dataset):
        assert np.array_equal(np.stack(list(open_images(source))), np.stack(pixels))
        open_images(source).fingerprint()

    # Completion and CLIP take images that are open.
    opened = [Image.open(io.BytesIO(ODD[name][0])) for name in NAMES]
    assert torch.equal(class_pipe.encode_image(opened), class_pipe.encode_image(expected))
    model, processor = build_clip()
    with torch.no_grad():
        assert torch.equal(embed_images(model, processor, opened), embed_images(model, processor, expected))


def test_arrays_and_tensors_are_the_image_that_they_hold():
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    sources = (values, values / 255, values.astype(np.int32), values * np.uint16(257), tensor, tensor / 255)
    for source in sources:
        np.testing.assert_array_equal(np.array(read_image(source)), values)
    assert read_image(np.array([[True, False]])).getpixel((0, 0)) == (255, 255, 255)
    assert read_image(np.full((2, 2, 4), 0.0)).getpixel((0, 0)) == (255, 255, 255)  # transparent
    assert read_image(torch.full((1, 2, 2), 0.5, dtype=torch.bfloat16)).getpixel((0, 0)) == (128, 128, 128)
    for source, message in (
        (np.zeros((2, 2, 5)), r"shape \(2, 2, 5\); expected rows, columns and up to 4 channels"),
        (np.zeros((0, 2, 3)), "no pixels"),
        (np.full((2, 2), -1.0), "values go from -1 to -1; expected 0 to 1"),
        (np.full((2, 2), 1e6), "values go from 1e.06"),
        (torch.full((3, 2, 2), torch.nan), "values go from nan"),
    ):
        with pytest.raises(ValueError, match=message):
            read_image(source)


def test_ordinary_images_stay_as_they_are():
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for options in ({}, {"icc_profile": SRGB}):
        for format in ("PNG", "BMP", "TIFF"):
            image = read_image(io.BytesIO(encoded(Image.fromarray(values), format, **options)))
            np.testing.assert_array_equal(np.array(image), values)
    photograph = encoded(Image.fromarray(values), "JPEG")
    assert read_image(io.BytesIO(photograph)).tobytes() == Image.open(io.BytesIO(photograph)).tobytes()


@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_what_can_not_be_read_is_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(UNREADABLE[name])
    with pytest.raises(ValueError, match=rf"^The image '.*{name}' can't be read: .*\.$") as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(ValueError, match="^The image can't be read: "):
        read_image(io.BytesIO(UNREADABLE[name]))
    if name == "photo.heic":
        assert "pillow-heif" in str(error.value)


def test_evaluation_leaves_out_what_can_not_be_read(tmp_path):
    for name, content in UNREADABLE.items():
        (tmp_path / name).write_bytes(content)
    encoded_rows = [{"bytes": content, "path": None} for content in UNREADABLE.values()]
    encoded_rows += [None, {"bytes": None, "path": str(tmp_path / "absent.png")}]
    rows = datasets.Dataset.from_dict({"image": encoded_rows}, features=datasets.Features(image=datasets.Image()))
    for source, count in ((tmp_path, len(UNREADABLE)), (rows, len(UNREADABLE) + 2)):
        images = open_images(source, skip_bad=True)
        images.fingerprint()
        assert list(images) == [] and len(images.skipped) == count


def test_other_reasons_are_sentences_too(tmp_path):
    with pytest.raises(UnreadableImage, match=r"^The image '.*absent.png' does not exist\.$"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(UnreadableImage, match="^The image '.*' can't be read: "):
        read_image(tmp_path)
    with pytest.raises(UnreadableImage, match="it has no pixels"):
        read_image(Image.new("RGB", (0, 3)))
    large = io.BytesIO(encoded(Image.new("1", (3000, 1000))))
    with pytest.raises(UnreadableImage, match="too large: it has 3 megapixels, at most 2.5 are taken"):
        read_image(large, max_megapixels=2.5)
    assert read_image(large).size == (3000, 1000)
    with pytest.raises(UnreadableImage, match="too large: at most 179 megapixels are taken"):
        read_image(io.BytesIO(encoded(Image.new("1", (20000, 20000)))))
