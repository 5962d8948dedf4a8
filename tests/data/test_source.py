"""Datasets of any kind as rows: splits, columns, and rows that are held out."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from llamagen_hf.data.samples import decode_image  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return {"bytes": buffer.getvalue(), "path": None}


# What each kind of input holds: images of different sizes, a caption and a class each.
COUNT = 6
CAPTIONS = [f"image {i}" for i in range(COUNT)]
LABELS = [i // 3 for i in range(COUNT)]


def image(i):
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
            image(i).save(root / folder / f"{i}.png")
        tar = root / "tars" / f"part-{LABELS[i]:03d}.tar"
        with tarfile.open(tar, "a") as file:
            for extension, content in (
                ("png", encoded(image(i))["bytes"]),
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
        {"image": [image(i) for i in range(COUNT)], "caption": CAPTIONS, "label": LABELS}, features
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
        np.testing.assert_array_equal(np.array(decode_image(row[data.image_column])), np.array(image(i)))
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
        ("parquet", {"image_column": "label"}, "The column 'label' of .* holds ClassLabel.*, not images"),
        ("parquet", {"label_column": "caption"}, "The column 'caption' of .* holds Value.*, not class ids"),
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
