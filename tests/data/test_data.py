"""Images from any kind of dataset to tensors: sources, decoding, crops, and rows that can't be used."""

import io
import json
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from llamagen_hf.data.samples import (  # noqa: E402
    BadRow,
    BadRows,
    decode_image,  # noqa: E402
)
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.images.transforms import (  # noqa: E402
    center_crop,
    random_crop,
    shifted_crop,
    ten_crop,
    to_tensor,
)


SIZES = [(65, 130), (33, 47), (300, 129), (257, 511), (32, 32), (20, 31)]


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return {"bytes": buffer.getvalue(), "path": None}


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


# What each kind of input holds: images of different sizes, a caption and a class each.
COUNT = 6
CAPTIONS = [f"image {i}" for i in range(COUNT)]
LABELS = [i // 3 for i in range(COUNT)]


def picture(i):
    return noise(20 + i, 18, seed=i)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The same images as class folders, one folder, one with metadata.jsonl, Parquet, JSON lines and tar shards.

    And folders that can't be read.
    """
    root = tmp_path_factory.mktemp("inputs")
    for kind in ("classes/cat", "classes/dog", "flat", "metadata", "parquet", "tars"):
        (root / kind).mkdir(parents=True)
    for i in range(COUNT):
        for folder in (("classes/cat", "classes/dog")[LABELS[i]], "flat", "metadata"):
            picture(i).save(root / folder / f"{i}.png")
        tar = root / "tars" / f"part-{LABELS[i]:03d}.tar"
        with tarfile.open(tar, "a") as file:
            for extension, content in (
                ("png", encoded(picture(i))["bytes"]),
                ("txt", CAPTIONS[i].encode()),
                ("cls", str(LABELS[i]).encode()),
            ):
                info = tarfile.TarInfo(f"{i:04d}.{extension}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    lines = [{"file_name": f"{i}.png", "caption": CAPTIONS[i]} for i in range(COUNT)]
    (root / "metadata" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"image": str(root / "flat" / f"{i}.png"), "caption": CAPTIONS[i]} for i in range(COUNT)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    rows = datasets.Dataset.from_dict(
        {"image": [picture(i) for i in range(COUNT)], "caption": CAPTIONS, "label": LABELS}, features
    )
    for kind in ("broken", "empty", "mixed", "labels"):
        (root / kind).mkdir()
    (root / "broken" / "train.parquet").write_bytes(b"no parquet")
    (root / "broken" / "train.jsonl").write_text('{"image": "a.png"}\n{"image')
    for column in ("image", "photo"):
        datasets.Dataset.from_dict({column: ["a.png"]}).to_parquet(root / "mixed" / f"{column}.parquet")
    paths = datasets.Features(image=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"]))
    pq.write_table(pa.table({"image": ["a.png"], "label": [2]}, paths.arrow_schema), root / "labels" / "train.parquet")
    rows.select(range(4)).to_parquet(root / "parquet" / "train-0.parquet")
    rows.select(range(4, COUNT)).to_parquet(root / "parquet" / "train-1.parquet")
    return root


TAR = {"image_column": "png", "label_column": "cls"}
NAMES = {0: "cat", 1: "dog"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "dataset, settings, caption_column, names",
    [
        ("classes", {"label_column": "label"}, None, NAMES),
        ("flat", {}, None, None),
        ("flat/*.png", {}, None, None),
        ("metadata", {}, "caption", None),
        ("rows.jsonl", {}, "caption", None),
        ("parquet", {"label_column": "label"}, "caption", NAMES),
        ("parquet/*.parquet", {"label_column": "label"}, "caption", NAMES),
        ("tars", TAR, "txt", None),
        ("tars/part-{000..001}.tar", TAR, "txt", None),
    ],
)
def test_all_kinds_of_input_give_the_same_images(inputs, dataset, settings, caption_column, names, streaming):
    data = DataConfig(dataset=f"{inputs}/{dataset}", streaming=streaming, test_fraction=0, **settings)
    rows = data.load("train")
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    found = list(rows)
    assert len(found) == COUNT
    for i, row in enumerate(found):
        np.testing.assert_array_equal(np.array(decode_image(row[data.image_column])), np.array(picture(i)))
        assert caption_column is None or row[caption_column] == CAPTIONS[i]
        assert data.label_column is None or row[data.label_column] == LABELS[i]
    assert data.label_names(rows) == names
    assert data.load("test") is None


@pytest.mark.parametrize("test_split", [None, "test"])
def test_held_out_rows_are_disjoint_and_decided_by_the_seed(inputs, test_split):
    def captions(split, **kwargs):
        data = DataConfig(dataset=f"{inputs}/parquet", test_split=test_split, **kwargs)
        return data.load(split)["caption"][:]

    train, test = captions("train", test_fraction=0.34), captions("test", test_fraction=0.34)
    assert len(test) == 2 and sorted(train + test) == CAPTIONS and train == sorted(train)
    assert test == captions("test", test_fraction=0.34)
    assert len({tuple(captions("test", test_fraction=0.34, split_seed=seed)) for seed in range(10)}) > 1
    assert len(captions("test", test_fraction=0.01)) == 1 and len(captions("train", test_fraction=0.01)) == 5


def test_splits_that_exist_are_used(inputs, tmp_path):
    (tmp_path / "train-0.parquet").symlink_to(inputs / "parquet" / "train-0.parquet")
    (tmp_path / "test-0.parquet").symlink_to(inputs / "parquet" / "train-1.parquet")
    for streaming in (False, True):
        data = DataConfig(dataset=str(tmp_path), streaming=streaming)
        assert [row["caption"] for row in data.load("train")] == CAPTIONS[:4]
        assert [row["caption"] for row in data.load("test")] == CAPTIONS[4:]
    data = DataConfig(dataset=str(tmp_path), train_split="train[:2]", test_split="train[2:]")
    assert data.load("train")["caption"][:] == CAPTIONS[:2] and data.load("test")["caption"][:] == CAPTIONS[2:4]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "dataset, settings, message",
    [
        ("./absent", {}, "The dataset './absent' can't be read: there is no such folder.$"),
        ("parquet/x*.parquet", {}, "x..parquet' can't be read: At least one valid data file must be"),
        ("flat/*.gif", {}, "can't be read: there are no such files.$"),
        ("flat/*.doc", {}, r"can't be read: a file pattern must end in one of \.parquet, "),
        ("parquet", {"train_split": "training"}, "parquet' has no split 'training'; it has train.$"),
        ("parquet", {"image_column": "photo"}, "has no column 'photo'; it has image, caption, label.$"),
        ("parquet", {"label_column": "class"}, "has no column 'class'; it has image, caption, label.$"),
        ("parquet", {"image_column": "label"}, "The column 'label' of .* holds no images but ClassLabel"),
        ("parquet", {"label_column": "caption"}, "The column 'caption' of .* holds no class ids but Value"),
        ("broken", {}, "The dataset .*broken' can't be read: "),
        ("broken/*.jsonl", {}, "The dataset .*broken/.*jsonl' can't be read: JSON parse error"),
        ("empty", {}, "The dataset .*empty' can't be read: .*doesn't contain any data files"),
        ("parquet", {"dataset_config": "large"}, "can't be read: BuilderConfig 'large' not found"),
        ("some/absent", {}, "The dataset 'some/absent' can't be read: "),
    ],
)
def test_wrong_datasets_are_one_sentence(inputs, dataset, settings, message, streaming):
    path = dataset if "absent" in dataset else f"{inputs}/{dataset}"
    with pytest.raises(ValueError, match=message) as error:
        DataConfig(dataset=path, streaming=streaming, **settings).load("train")
    assert "\n" not in str(error.value)


def test_rows_that_contradict_their_types_are_one_sentence(inputs):
    with pytest.raises(ValueError, match="mixed' can't be read: .* because column names don't match.$") as error:
        DataConfig(dataset=f"{inputs}/mixed").load("train")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="labels' can't be read: Class label 2 greater than configured num_classes 2"):
        DataConfig(dataset=f"{inputs}/labels").load("train")


def test_one_row_is_too_few_to_hold_out(inputs):
    with pytest.raises(ValueError, match="too small to hold out test rows; set test_fraction to 0."):
        DataConfig(dataset=f"{inputs}/parquet", train_split="train[:1]").load("train")
    with pytest.raises(ValueError, match="test_fraction is 1.0; expected at least 0 and less than 1"):
        DataConfig(dataset="", test_fraction=1.0)
