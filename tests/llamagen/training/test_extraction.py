"""Images to codes and captions to text states, once: what is stored, and that a run goes on where it stopped."""

import functools
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from launching import launch
from PIL import Image, ImageOps
from tiny import build_class_pipeline, build_text_encoder, build_vq_model
from tiny_images import paint, write_captions, write_images
from transformers import ByT5Tokenizer


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from llamagen_hf.autoencoders import load_vq_model  # noqa: E402
from llamagen_hf.conditioning.cache import decode_states, pad_left  # noqa: E402
from llamagen_hf.conditioning.text import encode_tokens, tokenize_prompts  # noqa: E402
from llamagen_hf.data.source import DataConfig  # noqa: E402
from llamagen_hf.images.transforms import center_crop, ten_crop, to_tensor  # noqa: E402
from llamagen_hf.llamagen.training.extraction import (  # noqa: E402
    CodeExtractionConfig,
    extract_codes,
    vq_model_fingerprint,
)
from llamagen_hf.loading.checkpoint import EMOJI_CHECKPOINT  # noqa: E402
from llamagen_hf.training.recipe import parse_recipe  # noqa: E402


SIZE, TRAIN, TEST = 8, 7, 3
CAPTIONS = ["a red circle", "two blue squares", None, "", "five", "a longer text than there is room for", "dots"]


def noise(seed, width=20, height=14):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_rows(path, seeds, images=None):
    features = datasets.Features(
        image=datasets.Image(), caption=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    rows = {
        "image": [png(noise(seed)) for seed in seeds] if images is None else images,
        "caption": [CAPTIONS[seed % len(CAPTIONS)] for seed in seeds],
        "label": [seed % 2 for seed in seeds],
    }
    datasets.Dataset.from_dict(rows, features).to_parquet(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, a text encoder and a dataset."""
    root = tmp_path_factory.mktemp("extraction")
    build_vq_model().save_pretrained(root / "tokenizer")
    build_text_encoder().save_pretrained(root / "text_encoder")
    ByT5Tokenizer().save_pretrained(root / "text_encoder")
    (root / "rows").mkdir()
    write_rows(root / "rows" / "train-0.parquet", range(TRAIN))
    write_rows(root / "rows" / "test-0.parquet", range(TRAIN, TRAIN + TEST))
    return root


@pytest.fixture
def extract(folder, tmp_path):
    """Runs an extraction to `tmp_path`, with settings of either section."""

    def run(output_dir=tmp_path, **settings):
        of_data = {name: settings.pop(name) for name in list(settings) if name in DataConfig.__dataclass_fields__}
        data = DataConfig(**{"dataset": str(folder / "rows"), "image_size": SIZE} | of_data)
        config = {"vq_model": str(folder / "tokenizer"), "output_dir": str(output_dir)}
        return extract_codes(data, CodeExtractionConfig(**config | settings))

    return run


def load(path, split="train"):
    files = sorted(str(file) for file in Path(path).glob(f"{split}-*.parquet"))
    return datasets.load_dataset("parquet", data_files=files, split="train")


tokenizer_model = functools.cache(build_vq_model)


@torch.no_grad()
def encode(crops, model=None):
    model = model or tokenizer_model()
    images = torch.stack([to_tensor(crop) for crop in crops]).to(model.dtype)
    return model.encode(images).codes.flatten(1).tolist()


def test_rows_keep_their_columns_and_gain_codes(extract, tmp_path):
    assert extract(label_column="label") == {"rows": {"train": TRAIN, "test": TEST}, "bad_rows": {}}
    rows = load(tmp_path)
    assert rows.column_names == ["caption", "label", "codes", "index"]
    assert rows.features["label"].names == ["cat", "dog"]
    assert rows.features["codes"] == datasets.List(datasets.List(datasets.Value("int32")))
    assert rows["caption"][:] == CAPTIONS and rows["index"][:] == list(range(TRAIN))
    assert rows["label"][:] == [i % 2 for i in range(TRAIN)]
    for split, first in (("train", 0), ("test", TRAIN)):
        for i, row in enumerate(load(tmp_path, split)):
            assert row["codes"] == encode([center_crop(noise(first + i), SIZE)])
    assert len({code for row in rows for code in row["codes"][0]}) > 10  # of a tokenizer that tells images apart

    info = json.loads((tmp_path / "codes.json").read_text())
    expected = {
        "vq_model_fingerprint": vq_model_fingerprint(build_vq_model()), "vocab_size": 64, "grid": [4, 4],
        "image_size": 8, "crops": "shifted", "num_crops": 1, "rows": {"train": TRAIN, "test": TEST}, "bad_rows": {},
    }  # fmt: skip
    assert expected.items() <= info.items() and "text_dim" not in info


def test_shifted_crops_are_windows_of_the_larger_image(extract, tmp_path):
    extract(num_crops=4, crop_ranges=[1.5, 1.25], batch_size=8)
    drawn = set()
    for i, row in enumerate(load(tmp_path)):
        windows = {}
        for side in (12, 10):
            larger = center_crop(noise(i), side)
            places = [(x, y) for x in range(side - SIZE + 1) for y in range(side - SIZE + 1)]
            codes = encode([larger.crop((x, y, x + SIZE, y + SIZE)) for x, y in places])
            windows |= {tuple(code): (side, *place) for code, place in zip(codes, places, strict=True)}
        center, *others = row["codes"]
        assert [center] == encode([center_crop(noise(i), SIZE)])
        drawn |= {windows[tuple(codes)] for codes in others}
    assert len(drawn) > 10 and {side for side, _, _ in drawn} == {12, 10}


def test_flip_and_ten_crop_by_their_layout(extract, tmp_path):
    extract(tmp_path / "flip", crops="flip")
    extract(tmp_path / "ten", crops="ten_crop", crop_ranges=[1.5, 1.25], batch_size=50)
    for i, (flip, ten) in enumerate(zip(load(tmp_path / "flip"), load(tmp_path / "ten"), strict=True)):
        center = center_crop(noise(i), SIZE)
        assert flip["codes"] == encode([center, ImageOps.mirror(center)])
        assert ten["codes"] == encode(ten_crop(noise(i), SIZE, 1.5)) + encode(ten_crop(noise(i), SIZE, 1.25))


def test_an_interrupted_run_goes_on(extract, tmp_path):
    settings = {"num_crops": 3, "rows_per_shard": 3}
    extract(tmp_path / "whole", **settings)
    names = [f"train-{i:05d}.parquet" for i in range(3)] + ["test-00000.parquet"]
    assert sorted(file.name for file in (tmp_path / "whole").glob("*.parquet")) == sorted(names)

    extract(tmp_path / "resumed", **settings)
    (tmp_path / "resumed" / names[1]).unlink()
    (tmp_path / "resumed" / f"{names[1]}.partial").write_bytes(b"half a file")
    (tmp_path / "resumed" / names[3]).unlink()
    written = {name: (tmp_path / "resumed" / name).stat().st_mtime_ns for name in (names[0], names[2])}
    report = extract(tmp_path / "resumed", **settings)
    assert report["rows"] == {"train": TRAIN, "test": TEST}
    for name in names:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all((tmp_path / "resumed" / name).stat().st_mtime_ns == time for name, time in written.items())
    assert not list((tmp_path / "resumed").glob("*.partial"))


@pytest.mark.parametrize("settings", [{"streaming": True}, {"num_workers": 2}, {"rows_per_shard": 2}])
def test_how_rows_are_read_does_not_matter(extract, tmp_path, settings):
    columns = {"num_crops": 2, "rows_per_shard": 3, "label_column": "label"}
    extract(tmp_path / "one", **columns)
    extract(tmp_path / "other", **columns | settings)
    for split in ("train", "test"):
        one, other = load(tmp_path / "one", split), load(tmp_path / "other", split)
        assert one.features == other.features and one[:] == other[:]


@pytest.mark.parametrize("streaming", [False, True])
def test_images_without_other_columns(extract, tmp_path, streaming):
    (tmp_path / "flat").mkdir()
    for i in range(4):
        noise(i).save(tmp_path / "flat" / f"{i}.png")
    report = extract(tmp_path / "codes", dataset=str(tmp_path / "flat"), test_fraction=0.0, streaming=streaming)
    assert report["rows"] == {"train": 4, "test": 0}
    rows = load(tmp_path / "codes")
    assert rows.column_names == ["codes", "index"] and rows[2]["codes"] == encode([center_crop(noise(2), SIZE)])


def test_columns_named_as_ours_are_replaced(extract, tmp_path):
    rows = {"image": [png(noise(0))], "index": [41], "codes": ["morse"]}
    features = datasets.Features(image=datasets.Image(), index=datasets.Value("int32"), codes=datasets.Value("string"))
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    extract(tmp_path / "codes", dataset=str(tmp_path / "rows.parquet"), test_fraction=0.0)
    assert load(tmp_path / "codes")[:] == {"codes": [encode([center_crop(noise(0), SIZE)])], "index": [0]}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_crops": 3}, r"other settings \(num_crops 2, not 3\); give another output_dir"),
        ({"crop_ranges": [1.2]}, r"other settings .crop_ranges \[1.1\], not \[1.2\]"),
        ({"image_size": 16}, r"other settings .grid \[4, 4\], not \[8, 8\]"),
        ({"seed": 1}, "other settings .seed 0, not 1"),
        ({"test_split": None}, "other settings .test_split 'test', not None"),
    ],
)
def test_codes_of_other_settings_are_refused(extract, tmp_path, settings, message):
    extract(num_crops=2, batch_size=64)
    extract(num_crops=2, batch_size=3, max_bad_rows=5)  # these do not decide the result
    with pytest.raises(ValueError, match=message):
        extract(**{"num_crops": 2} | settings)


def test_a_run_that_an_earlier_version_began_goes_on(extract, tmp_path):
    extract()
    written = (tmp_path / "train-00000.parquet").stat().st_mtime_ns
    info = json.loads((tmp_path / "codes.json").read_text())
    former = {"vq_model": "tokenizer", "vq_model_fingerprint": "vq_model_fingerprint"}
    (tmp_path / "codes.json").write_text(json.dumps({former.get(name, name): value for name, value in info.items()}))
    (tmp_path / "test-00000.parquet.partial").write_bytes(b"half a file")
    extract()
    assert json.loads((tmp_path / "codes.json").read_text()) == info
    assert (tmp_path / "train-00000.parquet").stat().st_mtime_ns == written
    assert not list(tmp_path.glob("*partial*"))


def test_codes_of_another_tokenizer_are_refused(extract, folder, tmp_path):
    extract()
    model = build_vq_model()
    model.save_pretrained(tmp_path / "moved")
    extract(vq_model=str(tmp_path / "moved"))
    model.quant_conv.bias.data += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="other settings .vq_model_fingerprint"):
        extract(vq_model=str(tmp_path / "other"))


@pytest.fixture
def faulty(tmp_path):
    """Ten rows: number 1 is cut off, 3 too small, 8 not there; 5, 6 and 7 have no valid class."""
    images = [png(noise(i)) for i in range(10)]
    images[1]["bytes"] = images[1]["bytes"][:200]
    images[3] = png(noise(3, 30, 9))
    images[8] = None
    (tmp_path / "faulty").mkdir()
    path = tmp_path / "faulty" / "train-0.parquet"
    write_rows(path, range(10), images=images)
    table = pq.read_table(path)
    labels = pa.array([0, 1, 1, 0, 0, -1, None, 2, 1, 0])
    pq.write_table(table.set_column(2, table.schema.field("label"), labels), path)
    return {"dataset": str(tmp_path / "faulty"), "test_fraction": 0.0, "label_column": "label", "min_image_size": 10}


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_left_out_and_counted(extract, faulty, tmp_path, streaming, caplog):
    output = tmp_path / "codes"
    settings = faulty | {"streaming": streaming, "rows_per_shard": 4, "max_bad_rows": 6}
    report = extract(output, **settings)
    faults = {"image can't be decoded": 1, "image too small": 1, "no valid class id": 3, "no image": 1}
    assert report == {"rows": {"train": 4, "test": 0}, "bad_rows": faults}
    assert json.loads((output / "codes.json").read_text())["bad_rows"] == faults
    rows = load(output)
    assert rows["index"][:] == [0, 2, 4, 9]
    assert [row["codes"] for row in rows] == [[encode([center_crop(noise(i), SIZE)])[0]] for i in rows["index"][:]]
    warnings = [record.message for record in caplog.records if record.name.endswith("samples")]
    assert "Can't use row 3: image too small: it is 30x9 pixels, the shorter side must be at least 10." in warnings
    assert "Can't use row 6: no valid class id: label is None." in warnings and len(warnings) == 6

    # What complete files left out is known to a resumed run.
    (output / "train-00001.parquet").unlink()
    assert extract(output, **settings) == report
    (output / "train-00002.parquet").unlink()
    with pytest.raises(
        ValueError, match="6 row.s. can't be used, more than max_bad_rows .5. allows; the last: row 8: no"
    ):
        extract(output, **settings | {"max_bad_rows": 5})
    assert not (output / "train-00002.parquet").exists()


def test_no_bad_row_is_allowed_unless_told_otherwise(extract, faulty, tmp_path):
    with pytest.raises(
        ValueError, match="1 row.s. can't be used, more than max_bad_rows .0. allows; the last: row 1: image"
    ):
        extract(tmp_path / "codes", **faulty)
    assert not list((tmp_path / "codes").glob("*.parquet"))


def test_a_file_of_bad_rows_only_can_be_read(extract, tmp_path):
    images = [None, None, png(noise(0))]
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train-0.parquet", range(3), images=images)
    settings = {"dataset": str(tmp_path / "rows"), "test_fraction": 0.0, "rows_per_shard": 2, "max_bad_rows": 2}
    assert extract(tmp_path / "codes", **settings) == {"rows": {"train": 1, "test": 0}, "bad_rows": {"no image": 2}}
    assert load(tmp_path / "codes")["index"][:] == [2]


def text_settings(folder):
    return {"text_encoder": str(folder / "text_encoder"), "text_columns": ["caption"], "condition_length": 20}


@pytest.mark.parametrize("streaming", [False, True])
def test_text_states_are_those_of_the_encoder(extract, folder, tmp_path, streaming):
    extract(**text_settings(folder), streaming=streaming, batch_size=2)
    rows = load(tmp_path)
    info = json.loads((tmp_path / "codes.json").read_text())
    assert info["text_dim"] == 16 and info["condition_length"] == 20
    assert rows.column_names == ["caption", "label", "codes", "index", "caption_states"]
    captions = [caption for caption in CAPTIONS if caption is not None]
    stored = rows["caption_states"][:]
    assert [value is None for value in stored] == [caption is None for caption in CAPTIONS]
    states = [decode_states(value, info["text_dim"]) for value in stored if value is not None]

    encoder, tokenizer = build_text_encoder(), ByT5Tokenizer()
    for caption, found in zip(captions, states, strict=True):
        tokens = tokenizer(caption, return_tensors="pt", truncation=True, max_length=20)
        with torch.no_grad():
            expected = encoder(**tokens).last_hidden_state[0]
        assert found.dtype == torch.float16 and found.shape == expected.shape
        torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)

    with torch.no_grad():
        expected, mask = encode_tokens(encoder, *tokenize_prompts(tokenizer, captions, 20, "unicode"), 20)
    padded, padded_mask = pad_left(states, 20)
    assert torch.equal(padded_mask, mask) and padded.dtype == torch.float32
    torch.testing.assert_close(padded, expected.half().float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(padded[0], pad_left([states[0]], 20)[0][0])


def test_texts_that_are_lost_to_cleaning_have_no_states(extract, folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CAPTIONS", ["红色的圆", *CAPTIONS[1:]])
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        write_rows(tmp_path / "rows" / f"{split}-0.parquet", range(TRAIN))
    settings = text_settings(folder) | {"dataset": str(tmp_path / "rows")}
    extract(**settings, prompt_cleaning="released")
    stored = load(tmp_path)["caption_states"]
    assert [value is None for value in stored] == [True, False, True, False, False, False, False]
    assert "Cleaning leaves nothing of 1 texts" in caplog.text
    info = json.loads((tmp_path / "codes.json").read_text())
    assert info["prompt_cleaning"] == "released"
    del info["prompt_cleaning"]  # as of codes from before there was a choice
    (tmp_path / "codes.json").write_text(json.dumps(info))
    extract(**settings, prompt_cleaning="released")
    with pytest.raises(ValueError, match="settings .prompt_cleaning 'released', not 'unicode'"):
        extract(**settings)


def test_half_precision_survives_the_file(extract, folder, tmp_path):
    extract(**text_settings(folder), batch_size=1)
    tokens = tokenize_prompts(ByT5Tokenizer(), ["five"], 20, "unicode")
    with torch.no_grad():
        states, mask = encode_tokens(build_text_encoder(), *tokens, 20)
    stored = load(tmp_path)["caption_states"][4]
    assert torch.equal(decode_states(stored, 16), states[0, mask[0].bool()].half()) and len(stored) == 5 * 16 * 2


def test_bfloat16_tokenizer(extract, tmp_path):
    extract(dtype="bfloat16", train_split="train[:2]", test_split="test[:1]", batch_size=2)
    model = build_vq_model()
    fingerprint = vq_model_fingerprint(model)
    model.to(torch.bfloat16)
    expected = encode([center_crop(noise(i), SIZE) for i in range(2)], model)
    assert load(tmp_path)["codes"][:] == [[codes] for codes in expected]
    assert json.loads((tmp_path / "codes.json").read_text())["vq_model_fingerprint"] == fingerprint


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"crops": "random"}, "crops is 'random'; expected 'shifted', 'flip' or 'ten_crop'."),
        (
            {"crops": "flip", "num_crops": 2},
            "num_crops is 2; expected at least 1, and more only if crops is 'shifted'",
        ),
        ({"num_crops": 0}, "num_crops is 0; expected at least 1"),
        ({"crop_ranges": [0.9]}, r"crop_ranges is \[0.9\]; expected numbers of at least 1."),
        ({"dtype": "float8"}, "dtype is 'float8'; expected 'float32' or 'bfloat16'."),
        ({"text_columns": ["caption"]}, "text_encoder and text_columns go together"),
        ({"image_size": 9}, "image_size is 9; this tokenizer takes multiples of 2."),
    ],
)
def test_wrong_settings_are_one_sentence(extract, settings, message):
    with pytest.raises(ValueError, match=message):
        extract(**settings)


@pytest.mark.parametrize("column", ["title", "label"])
def test_text_columns_hold_text(extract, folder, column):
    with pytest.raises(ValueError, match=f"text_columns has '{column}', not a text column; there are .'image', 'cap"):
        extract(**text_settings(folder) | {"text_columns": [column]})


def test_the_recipe_reads_both_sections(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {dataset: a, test_split: null}\n"
        "codes: {vq_model: b, output_dir: c, crops: ten_crop, crop_ranges: [1.1, 1.05], text_encoder: d, "
        "text_columns: [caption]}"
    )
    flags = ["--config", str(recipe), "--seed", "3", "--label_column", "label"]
    data, codes = parse_recipe("", ("data", DataConfig), ("codes", CodeExtractionConfig), args=flags)
    assert data == DataConfig("a", test_split=None, label_column="label")
    expected = CodeExtractionConfig("b", "c", "ten_crop", text_encoder="d", text_columns=["caption"], seed=3)
    assert codes == replace(expected, crop_ranges=[1.1, 1.05]) and codes.grids_per_image == 20


@pytest.mark.slow
@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_processes_share_out_the_files(extract, folder, tmp_path, streaming):
    extract(tmp_path / "one", num_crops=2, rows_per_shard=2)
    pipelines = Path(__file__).parents[3] / "pipelines"
    command = [pipelines / "extract_codes.py", "--dataset", folder / "rows", "--image_size", str(SIZE),
               "--vq_model", folder / "tokenizer", "--output_dir", tmp_path / "two", "--num_crops", "2",
               "--rows_per_shard", "2", "--streaming", streaming]  # fmt: skip
    result = launch(*command)
    assert json.loads(result.stdout) == {"rows": {"train": TRAIN, "test": TEST}, "bad_rows": {}}
    for split in ("train", "test"):
        assert load(tmp_path / "one", split)[:] == load(tmp_path / "two", split)[:]


def test_a_folder_of_images_alone_gives_codes_alone(tmp_path):
    build_vq_model().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.new("RGB", (40, 40), (50 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    data = DataConfig(dataset=str(tmp_path / "images"), image_size=16, test_fraction=0.2)
    config = CodeExtractionConfig(str(tmp_path / "tokenizer"), str(tmp_path / "codes"), crops="ten_crop")
    assert extract_codes(data, config)["rows"] == {"train": 4, "test": 1}
    train, test = (
        datasets.load_dataset("parquet", data_files=str(tmp_path / "codes" / f"{split}-*.parquet"), split="train")
        for split in ("train", "test")
    )
    assert train.column_names == ["codes", "index"]
    assert len(train[0]["codes"]) == 10 and len(test[0]["codes"]) == 1  # tests are on the centre crop


def test_a_mistake_records_nothing(tmp_path):
    build_vq_model().save_pretrained(tmp_path / "tokenizer")
    config = CodeExtractionConfig(str(tmp_path / "tokenizer"), str(tmp_path / "codes"))
    with pytest.raises(ValueError, match="can't be read"):
        extract_codes(DataConfig(dataset=str(tmp_path / "absent"), image_size=16), config)
    assert not (tmp_path / "codes").exists()


def test_tokenizers_come_alone_or_in_a_pipeline(tmp_path):
    fingerprint = vq_model_fingerprint(load_vq_model("emoji"))
    assert fingerprint == vq_model_fingerprint(load_vq_model(str(EMOJI_CHECKPOINT / "vq_model")))
    assert load_vq_model("emoji", sample_size=32).config.sample_size == 32
    AutoencoderTiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds AutoencoderTiny; expected an image tokenizer"):
        load_vq_model(str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="The weights of .* can't be loaded"):
        load_vq_model(str(tmp_path))
    with pytest.raises(ValueError, match="There is no image tokenizer '.*absent'.*train one first"):
        load_vq_model(str(tmp_path / "absent"))


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.parquet")}


@pytest.fixture
def extraction(tmp_path):
    """Runs one on `tmp_path / "images"`, by another name of the folder if need be."""
    write_images(tmp_path / "images")
    build_vq_model().save_pretrained(tmp_path / "tokenizer")
    build_text_encoder().save_pretrained(tmp_path / "text_encoder")
    ByT5Tokenizer().save_pretrained(tmp_path / "text_encoder")

    def run(dataset=None, vq_model=None, text=False, **settings):
        data = DataConfig(str(dataset or tmp_path / "images"), image_size=8, test_fraction=0.0)
        if text:
            settings |= {"text_encoder": str(tmp_path / "text_encoder"), "text_columns": ["caption"]}
        vq_model = vq_model or str(tmp_path / "tokenizer")
        config = CodeExtractionConfig(vq_model, str(tmp_path / "codes"), rows_per_shard=2, **settings)
        return extract_codes(data, config)["rows"]["train"]

    return run


def codes_of(folder):
    shards = sorted(str(path) for path in folder.glob("train-*.parquet"))
    return datasets.load_dataset("parquet", data_files=shards, split="train")


def test_codes_of_the_same_images_go_on(extraction, tmp_path, monkeypatch):
    extraction()
    (tmp_path / "codes" / "train-00001.parquet").unlink()
    before = times(tmp_path / "codes")
    os.utime(tmp_path / "images" / "2.png")
    monkeypatch.chdir(tmp_path)
    assert extraction(dataset="images") == 6
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "tokenizer").rename(tmp_path / "other_place")
    assert extraction(dataset=tmp_path / "elsewhere", vq_model="other_place") == 6
    assert before.items() <= times(tmp_path / "codes").items()  # nothing was made again


def test_codes_of_other_images_are_refused_or_replaced(extraction, tmp_path):
    folder, codes = tmp_path / "images", tmp_path / "codes"
    extraction()
    before, first = times(codes), codes_of(codes)["codes"][:]
    (codes / "mine.txt").write_text("foreign")
    for change, message in (
        (lambda: paint(folder / "1.png", 200), r"1 file of the dataset was changed \(1.png\)"),
        (lambda: write_captions(folder, "another"), r"2 files of the dataset were changed \(1.png, metadata.jsonl\)"),
        (lambda: paint(folder / "6.png", 1), r"1 file of the dataset was added \(6.png\)"),
        (lambda: (folder / "0.png").unlink(), r"1 file of the dataset was removed \(0.png\)"),
    ):
        change()
        with pytest.raises(ValueError, match=f"{message}.*start over with --overwrite"):
            extraction()
    assert times(codes) == before
    (folder / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": path.name, "caption": "new"}) for path in sorted(folder.glob("*.png")))
    )
    assert extraction(overwrite=True) == 6
    assert set(codes_of(codes)["caption"]) == {"new"} and codes_of(codes)["codes"][0] != first[1]
    assert (codes / "mine.txt").is_file() and extraction() == 6


def test_overwriting_also_changes_settings_and_weights(extraction, tmp_path):
    extraction(text=True)
    encoder = build_text_encoder()
    encoder.shared.weight.data += 1
    encoder.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match=r"1 file of the text encoder was changed \(model.safetensors\)"):
        extraction(text=True)
    with pytest.raises(ValueError, match="num_crops 1, not 2.*; .* or start over with --overwrite"):
        extraction(num_crops=2, text=True)
    assert extraction(num_crops=2, overwrite=True) == 6
    assert len(codes_of(tmp_path / "codes")["codes"][0]) == 2


def test_a_killed_overwriting_leaves_no_mixture(extraction, tmp_path, monkeypatch):
    codes = tmp_path / "codes"
    extraction()
    paint(tmp_path / "images" / "1.png", 200)

    class Killed(BaseException):
        pass

    remove = Path.unlink

    def unlink(path, missing_ok=False):
        if path.name == "train-00002.parquet":
            raise Killed
        remove(path, missing_ok)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Path, "unlink", unlink)
        extraction(num_crops=2, overwrite=True)
    assert "rows" not in json.loads((codes / "codes.json").read_text())  # no training takes it for complete
    for settings, message in (({}, "was changed"), ({"num_crops": 2}, "num_crops 1, not 2")):
        with pytest.raises(ValueError, match=message):
            extraction(**settings)
    assert extraction(num_crops=2, overwrite=True) == 6
    assert all(len(grids) == 2 for grids in codes_of(codes)["codes"])


def test_codes_of_unknown_input_are_read_but_not_gone_on_with(extraction, tmp_path):
    extraction()
    (tmp_path / "codes" / ".inputs.json").unlink()
    with pytest.raises(ValueError, match="does not say what it was made from.*start over with --overwrite"):
        extraction()
    (tmp_path / "codes" / "codes.json").unlink()
    for overwrite in (False, True):  # shards without a record may be anybody's
        with pytest.raises(ValueError, match="holds files of something else"):
            extraction(overwrite=overwrite)
    assert len(codes_of(tmp_path / "codes")) == 6


def test_extraction_takes_a_pipeline_or_the_shipped_checkpoint(extraction, tmp_path):
    build_class_pipeline().save_pretrained(tmp_path / "pipeline")
    extraction(vq_model=str(tmp_path / "pipeline"))
    assert extraction() == 6  # its tokenizer is the same
    assert extraction(vq_model="emoji", overwrite=True) == 6
