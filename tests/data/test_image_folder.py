"""Folders of images as rows: their structure decides on splits and classes, and no file vanishes without a word."""

import json
import logging
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, features


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.data.image_folder import read_image_folder  # noqa: E402
from llamagen_hf.data.samples import decode_image  # noqa: E402
from llamagen_hf.data.shards import open_rows  # noqa: E402
from llamagen_hf.data.source import DataConfig, files_report, open_dataset  # noqa: E402
from llamagen_hf.evaluation.images import open_images  # noqa: E402
from llamagen_hf.images.reading import find_files  # noqa: E402


AVIF = "e.avif" if features.check("avif") else "e.bmp"


def write(folder, *names):
    """Images of one colour each, in the order of `names`; other files are empty."""
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".png", ".jpg", ".bmp", ".avif", ".tiff"):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
        else:
            path.touch()
    return folder


def load(folder, split="train", streaming=False, **settings):
    settings = {"test_fraction": 0, "test_split": None} | settings
    return DataConfig(str(folder), streaming=streaming, **settings).load(split)


def paths(rows, folder):
    return [os.path.relpath(row["image"]["path"], folder) for row in rows]


def metadata(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        [
            "bus/1.png",
            "bus/2.png",
            "car/1.png",
            "car/2.png",
            "train/1.png",
            "train/2.png",
        ],  # a train is a vehicle, too
        ["dev/1.png", "prod/1.png"],
        ["test/1.png", "train/1.png", "valley/1.png"],
        ["test/1.png", "val/1.png"],
    ],
)
def test_class_folders_are_classes_whatever_they_are_called(tmp_path, names, streaming, caplog):
    rows = load(write(tmp_path, *names), label_column="label", streaming=streaming)
    assert paths(rows, tmp_path) == names
    folders = sorted({name.split("/")[0] for name in names})
    assert rows.features["label"].names == folders
    assert [row["label"] for row in rows] == [folders.index(name.split("/")[0]) for name in names]
    assert "are taken as ordinary folders, not as splits" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        [f"{i:02d}.png" for i in range(20)] + ["my train trip.png"],
        ["test.png"],
        ["dev.png", "train.png", "validation.png"],
        ["test-0.png", "train-0.png"],
        ["val_shots/1.png", "val_shots/2.png"],
        ["2024 test/1.png", "a.png", "train/b.png"],
        ["photos/test/1.png"],
    ],
)
def test_names_that_sound_like_splits_are_not(tmp_path, names):
    assert sorted(paths(load(write(tmp_path, *names)), tmp_path)) == sorted(names)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("base", ["", "data/", "archive/photos [2024]/"])
@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "TEST"), ("training", "eval")])
def test_folders_that_are_all_splits_are_splits(tmp_path, base, train, test, streaming):
    names = [f"{base}{split}/{kind}/{i}.png" for split in (train, "val", test) for kind in "ab" for i in range(2)]
    write(tmp_path, *names, "README.md")
    for split, part in (("train", names[:4]), ("test", names[8:]), ("validation", names[4:8])):
        data = DataConfig(str(tmp_path), test_split="test", streaming=streaming, label_column="label")
        if split == "validation":
            data.train_split, split = split, "train"
        rows = data.load(split)
        assert paths(rows, tmp_path) == part and [row["label"] for row in rows] == [0, 0, 1, 1]
        assert rows.features["label"].names == ["a", "b"]


def test_flat_splits_have_no_classes_and_can_be_cut(tmp_path):
    write(tmp_path, *(f"train/{i}.png" for i in range(4)), *(f"test/{i}.png" for i in range(2)))
    assert list(load(tmp_path).features) == ["image"]
    assert paths(load(tmp_path, train_split="train[1:3]+test[:1]"), tmp_path) == [
        "train/1.png",
        "train/2.png",
        "test/0.png",
    ]
    with pytest.raises(ValueError, match="has no split 'val'; it has train, test"):
        load(tmp_path, train_split="val")


@pytest.mark.parametrize("streaming", [False, True])
def test_ordinary_folders_are_the_rows_that_the_library_reads(tmp_path, streaming):
    classes = write(
        tmp_path / "classes", *(f"{kind}/{i}.jpg" for kind in ("a b", "a", "a-b", "Z") for i in (10, 9, 1))
    )
    flat = write(tmp_path / "flat", *(f"{i}.png" for i in (10, 9, 1)))
    splits = write(
        tmp_path / "splits", *(f"{s}/{k}/{i}.png" for s in ("train", "test") for k in "ab" for i in range(2))
    )
    listed = write(tmp_path / "listed", "b/2.png", "a/1.png", "a/3.png", "b/0.png")
    metadata(listed, *({"file_name": f, "caption": f, "n": 1} for f in ("b/2.png", "a/3.png", "a/1.png", "b/0.png")))
    table = write(tmp_path / "table", "1.png", "2.png")
    (table / "metadata.csv").write_text("file_name,caption\n2.png,two\n1.png,one\n")
    for folder in (classes, flat, splits, listed, table):
        expected = datasets.load_dataset(str(folder), streaming=streaming)
        found = open_dataset(str(folder), None, None, streaming)
        assert list(found) == list(expected)
        for split in expected:
            assert found[split].features == expected[split].features
            ours, theirs = (
                rows.cast_column("image", datasets.Image(decode=False)) for rows in (found[split], expected[split])
            )
            assert list(ours) == list(theirs)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_all_names_and_kinds_are_found(tmp_path, streaming):
    folder = tmp_path / "photos [of *?] größe {1..2} #%20"
    names = [
        "a [1].png",
        "b?.jpg",
        "c.PNG",
        "d.Jpg",
        AVIF,
        "f.TIFF",
        "grün/ h.png",
        "i/[x]/*.bmp",
    ]
    write(folder, *names)
    write(tmp_path / "elsewhere", "linked.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "link" / "around").symlink_to(folder, target_is_directory=True)
    (folder / "broken.png").symlink_to(tmp_path / "absent.png")
    shutil.copy(folder / "c.PNG", os.fsencode(folder) + b"/\xff.png")
    rows = load(folder, streaming=streaming)
    assert paths(rows, folder) == sorted([*names, "link/linked.png"])
    assert all(decode_image(row["image"]).size == (8, 8) for row in rows)
    assert find_files(folder).left_out == {
        "broken link": 1,
        "link to a folder around it": 1,
        "name that is not UTF-8": 1,
    }
    images = open_images(folder)
    assert images._names == sorted([*names, "link/linked.png"]) and len(list(images)) == 9


HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "._a.png", ".DS_Store",
    "__MACOSX/._a.png", "__MACOSX/a.png", ".thumbnails/a.jpg", "cat/._b.png", "cat/@eaDir/b.jpg", "Thumbs.db",
    "desktop.ini", ".a.png.partial",
]  # fmt: skip


def test_what_is_hidden_is_no_image_for_anyone(tmp_path, caplog):
    write(tmp_path, "a.png", "cat/b.png", *HIDDEN)
    for name in HIDDEN:  # as real images, which nothing but their names tells apart
        shutil.copy(tmp_path / "a.png", tmp_path / name)
    with caplog.at_level(logging.INFO):
        for streaming in (False, True):
            assert paths(load(tmp_path, streaming=streaming), tmp_path) == ["a.png", "cat/b.png"]
    assert (
        "Read 2 of 2 images (2 in train rows); left out: 9 hidden, 1 no image (.db), 1 no image (.ini)." in caplog.text
    )
    config = SimpleNamespace(dataset=str(tmp_path), split="train")
    assert len(list(open_rows(config, ["image"]))) == 2
    images = open_images(tmp_path)
    assert len(list(images)) == 2
    assert images.left_out == {"hidden": 9, "no image (.db)": 1, "no image (.ini)": 1}
    assert files_report(str(tmp_path)) == {
        "files": {"images": 2, "used": 2, "left_out": {"hidden": 9, "no image (.db)": 1, "no image (.ini)": 1}}
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_text_files_beside_the_images_are_captions(tmp_path, streaming, caplog):
    write(tmp_path, "x/a.png", "x/b.png", "y/c.png", "y/d.jpg", "y/readme.txt", "y/d.json")
    (tmp_path / "x/a.txt").write_text("\ufeffein roter Apfel, größer\n", "utf-8")
    (tmp_path / "x/b.caption").write_text("a bee", "utf-8")
    for kind in ("txt", "caption"):
        (tmp_path / f"y/c.{kind}").write_text(kind)
    rows = load(tmp_path, streaming=streaming, label_column="label")
    assert [row["text"] for row in rows] == ["ein roter Apfel, größer", "a bee", "txt", None]
    assert [row["label"] for row in rows] == [0, 0, 1, 1]
    assert "1 of 4 images have no caption file beside them" in caplog.text
    left_out = {"no image (.txt)": 1, "no image (.json)": 1, "no image (.caption)": 1}
    assert read_image_folder(tmp_path).report["left_out"] == left_out


def test_captions_that_are_no_text_are_one_sentence(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match="can't be read: the caption 'a.txt' can't be read as UTF-8 text.$"):
        load(tmp_path)


def test_metadata_say_which_images_are_rows(tmp_path, caplog):
    folder = write(tmp_path / "[x]", "1.png", "2.png", "3.png", "3.txt", "sub/4.png")
    metadata(folder, *({"file_name": name, "caption": name} for name in ("3.png", "absent.png", "sub/4.png")))
    rows = load(folder)
    assert [row["caption"] for row in rows] == ["3.png", "absent.png", "sub/4.png"]
    assert "1 row(s) of the metadata name images that do not exist" in caplog.text
    assert "2 of 4 images are not named in the metadata, so they are not rows" in caplog.text
    report = {"images": 4, "used": 2, "left_out": {"no image (.txt)": 1, "image not named in the metadata": 2}}
    assert read_image_folder(folder).report == report


def test_each_split_has_its_metadata(tmp_path):
    write(tmp_path, "train/1.png", "test/1.png")
    metadata(tmp_path / "train", {"file_name": "1.png", "caption": "one"})
    with pytest.raises(
        ValueError, match="there is train/metadata.jsonl, but no metadata in the folder of the split 'test'"
    ):
        load(tmp_path)
    metadata(tmp_path / "test", {"file_name": "1.png", "caption": "another"})
    assert [load(tmp_path, split, test_split="test")[0]["caption"] for split in ("train", "test")] == [
        "one",
        "another",
    ]


def test_a_class_that_lies_deeper_is_said(tmp_path, caplog):
    write(tmp_path, "a/1.png", "b/2.png", "3.png")
    assert list(load(tmp_path).features) == ["image"]
    assert "Folders are not taken as classes: 'a/1.png' lies deeper than '3.png'" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_with_a_few_images_beside_them_are_tables(tmp_path, streaming):
    folder = write(tmp_path / "a [1]", "preview.png")
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (8, 8))] * 3})
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    for source in (folder, folder / "train.parquet", folder / "*n.parquet"):
        assert len(list(load(source, streaming=streaming))) == 3
    assert len(list(load(folder, "test", streaming=streaming, test_split="test"))) == 3


def test_images_of_a_pattern_are_read_like_a_folder(tmp_path):
    folder = write(tmp_path / "[a]", "x/1.png", "x/2.PNG", "y/1.png", ".hidden/3.png")
    rows = load(folder / "*" / "*.png", label_column="label")
    assert paths(rows, folder) == ["x/1.png", "y/1.png"] and rows["label"][:] == [0, 1]
    assert len(load(folder / "x" / "1.png")) == 1
    with pytest.raises(ValueError, match="can't be read: there are no such files"):
        load(folder / "*.webp")


def test_a_large_folder_is_listed_quickly_and_shared_out(tmp_path):
    for i in range(1000):
        (tmp_path / f"{i % 10}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 10}" / f"{i}.png").touch()
    stream = load(tmp_path, streaming=True)
    assert stream.num_shards == 64
    assert [row["label"] for row in stream] == sorted(i % 10 for i in range(1000))
    np.testing.assert_array_equal(load(tmp_path)["label"][:], sorted(i % 10 for i in range(1000)))
