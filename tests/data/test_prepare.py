"""Data preparation: what the filter keeps, what models of the real classes add, and what a killed run loses."""

import io
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from launching import launch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

import pyarrow.parquet as pq  # noqa: E402

from llamagen_hf.data import filtering  # noqa: E402
from llamagen_hf.data import shards as tables  # noqa: E402
from llamagen_hf.data.filtering import FilterConfig, filter_rows, find_cutoff  # noqa: E402
from llamagen_hf.data.recaptioning import RecaptionConfig, caption_images, recaption  # noqa: E402
from llamagen_hf.data.scoring import ScoreConfig, load_aesthetic_head, score  # noqa: E402


PREPARE = Path(__file__).parents[2] / "pipelines" / "prepare.py"
URLS = {
    "http://a.example/1.jpg": True,
    "HTTPS://user:word@a.example:8080?x=1": True,
    "https://[2001:db8::1]/1.jpg": True,
    "https://a.example": True,
    "ftp://a.example/1.jpg": False,
    "a.example/1.jpg": False,
    "http:///1.jpg": False,
    "https://:80/1.jpg": False,
    "https://a example/1.jpg": False,
    "data:image/png;base64,AAAA": False,
    "": False,
}
THRESHOLDS = {"min_aesthetic": 4.5, "max_watermark": 0.6, "min_similarity": 0.2, "min_side": 256}


def metadata_rows(count=600):
    """Rows in the manner of LAION's tables; scores with one decimal, so that many tie, and some are missing."""
    rng = random.Random(0)

    def number(draw, missing=0.05):
        return rng.choice([None, math.nan]) if rng.random() < missing else draw()

    return [
        {
            "URL": rng.choice([*URLS, None]) if rng.random() < 0.3 else f"http://host{i}.example/{i}.jpg",
            "TEXT": f"image {i}",
            "aesthetic": number(lambda: round(rng.uniform(3, 7), 1)),
            "pwatermark": number(rng.random),
            "similarity": number(lambda: rng.uniform(0.1, 0.4)),
            "WIDTH": rng.choice([200, 256, 512, None]),
            "HEIGHT": rng.choice([255, 256, 300]),
        }
        for i in range(count)
    ]


def write_parquet(rows, folder, files=3):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        part = rows[i * len(rows) // files : (i + 1) * len(rows) // files]
        datasets.Dataset.from_list(part).to_parquet(folder / f"part-{i}.parquet")
    return f"{folder}/*.parquet"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rows = metadata_rows()
    return rows, write_parquet(rows, tmp_path_factory.mktemp("laion"))


def filter_config(table, folder, **kwargs):
    sizes = {"batch_size": 64, "rows_per_shard": 50}
    return FilterConfig(dataset=table[1], output_dir=str(folder), **sizes | kwargs)


def read(folder):
    return list(datasets.load_dataset("parquet", data_files=f"{folder}/train-*.parquet", split="train"))


def texts(rows):
    return [row["TEXT"] for row in rows]


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("train-*.parquet"))}


def first_failure(row, config):
    """The rules of the documentation, one row at a time."""

    def known(*columns):
        return all(row[column] is not None and not math.isnan(row[column]) for column in columns)

    url = row["URL"]
    if url is None or not URLS.get(url, True):
        return "url", url is None
    if config.min_aesthetic is not None and not (known("aesthetic") and row["aesthetic"] >= config.min_aesthetic):
        return "aesthetic", not known("aesthetic")
    if config.max_watermark is not None and not (known("pwatermark") and row["pwatermark"] <= config.max_watermark):
        return "watermark", not known("pwatermark")
    if config.min_similarity is not None and not (known("similarity") and row["similarity"] >= config.min_similarity):
        return "similarity", not known("similarity")
    sides = ("WIDTH", "HEIGHT")
    if config.min_side is not None and not (known(*sides) and min(row[side] for side in sides) >= config.min_side):
        return "image_size", not known(*sides)
    return None, False


def test_each_row_is_counted_at_the_first_rule_it_fails(table, tmp_path):
    config = filter_config(table, tmp_path, **THRESHOLDS)
    report = filter_rows(config)
    failures = [first_failure(row, config) for row in table[0]]
    for rule in ("url", "aesthetic", "watermark", "similarity", "image_size"):
        assert report["dropped"][rule] == sum(name == rule for name, _ in failures) > 0
        assert report["missing"][rule] == sum(name == rule and missing for name, missing in failures) > 0
    kept = [row for row, (name, _) in zip(table[0], failures, strict=True) if name is None]
    assert texts(read(tmp_path)) == texts(kept)
    assert (report["seen"], report["kept"], report["threshold"]) == (600, len(kept), None)
    assert sum(report["dropped"].values()) + report["kept"] == 600


def test_urls_with_a_web_scheme_and_a_host_are_valid(tmp_path):
    source = write_parquet([{"URL": url, "TEXT": url} for url in URLS], tmp_path / "input", files=1)
    filter_rows(filter_config((None, source), tmp_path / "output"))
    assert texts(read(tmp_path / "output")) == [url for url, valid in URLS.items() if valid]
    for url, valid in URLS.items():  # as the standard library reads them
        parts = urlsplit(url)
        assert valid == bool(parts.scheme in ("http", "https") and parts.hostname and " " not in parts.hostname)


def test_a_rule_that_is_not_set_drops_nothing(table, tmp_path):
    assert filter_rows(filter_config(table, tmp_path / "all", valid_url=False))["kept"] == 600
    report = filter_rows(filter_config(table, tmp_path / "large", valid_url=False, min_side=256))
    assert report["dropped"] == {"image_size": 600 - report["kept"]}


@pytest.mark.parametrize("count", [1, 7, 95, 250])
def test_the_best_rows_remain_exactly_and_in_order(table, tmp_path, count):
    config = filter_config(table, tmp_path, target_count=count, min_aesthetic=3.5, max_watermark=0.9)
    report = filter_rows(config)
    aesthetic = [row["aesthetic"] for row in table[0]]
    passing = [i for i, row in enumerate(table[0]) if first_failure(row, config)[0] is None]
    ranked = sorted(passing, key=lambda i: -aesthetic[i])  # the order of ties stays
    assert aesthetic[ranked[count - 1]] == aesthetic[ranked[count]]  # so some of them have to go
    best = sorted(ranked[:count])
    assert texts(read(tmp_path)) == texts([table[0][i] for i in best])
    assert report["kept"] == count and report["dropped"]["rank"] == len(passing) - count
    assert report["threshold"] == min(aesthetic[i] for i in best)


def test_a_target_above_the_number_of_rows_keeps_all_that_can_be_ranked(table, tmp_path):
    report = filter_rows(filter_config(table, tmp_path, valid_url=False, target_count=600, rank_by="similarity"))
    unranked = sum(row["similarity"] is None or math.isnan(row["similarity"]) for row in table[0])
    assert report["dropped"] == report["missing"] == {"rank": unranked}
    assert report["kept"] == 600 - unranked and report["threshold"] is None


def test_infinite_scores_are_not_the_best(tmp_path):
    scores = [math.inf, 1.0, 3.0, -math.inf, 2.0]
    source = write_parquet([{"TEXT": str(value), "aesthetic": value} for value in scores], tmp_path / "input", files=1)
    report = filter_rows(filter_config((None, source), tmp_path / "output", valid_url=False, target_count=2))
    assert texts(read(tmp_path / "output")) == ["3.0", "2.0"]
    assert (report["kept"], report["missing"]) == (2, {"rank": 2})


def test_the_cutoff_is_exact_when_scores_do_not_fit_in_memory(monkeypatch):
    monkeypatch.setattr(filtering, "SPARE_SCORES", 8)
    rng = np.random.default_rng(0)
    for count in (1, 10, 333, 2000):
        scores = rng.integers(0, 200, 3000) / 10
        cutoff = find_cutoff(np.array_split(scores, 17), count)
        expected = np.sort(scores)[-count]
        assert cutoff == {"score": expected, "ties": count - (scores > expected).sum()}
    assert find_cutoff([scores], 3000) is None


@pytest.mark.parametrize("kind", ["jsonl", "csv", "folder"])
def test_other_inputs_give_the_same_rows(table, tmp_path, kind):
    rows = [{name: None if value != value else value for name, value in row.items()} for row in table[0]]
    dataset = datasets.Dataset.from_list(rows)
    if kind == "jsonl":
        dataset.to_json(tmp_path / "rows.jsonl")
    elif kind == "csv":
        dataset.to_csv(tmp_path / "rows.csv")
    source = str(Path(table[1]).parent) if kind == "folder" else str(tmp_path / f"*.{kind}")
    expected = filter_rows(filter_config(table, tmp_path / "expected", **THRESHOLDS))
    found = filter_rows(filter_config((rows, source), tmp_path / "found", **THRESHOLDS))
    for report in (found, expected):
        del report["missing"]  # an empty URL is a null in a CSV file
    assert found == expected
    assert texts(read(tmp_path / "found")) == texts(read(tmp_path / "expected"))


def test_a_filter_that_broke_off_goes_on_where_it_stopped(table, tmp_path, monkeypatch):
    whole = filter_rows(filter_config(table, tmp_path / "whole"))
    config = filter_config(table, tmp_path / "broken")

    def fail_at_last(shard, path):
        if path.name == "train-00003.parquet":
            raise OSError("No space left on device")
        tables.write_shard(shard, path)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(filtering, "write_shard", fail_at_last)
        filter_rows(config)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("train-*.parquet")}
    assert len(times) == 3
    assert filter_rows(config) == whole
    assert shards(tmp_path / "broken") == shards(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_killed_filter_with_a_target_ends_as_if_it_had_not_been(table, tmp_path):
    config = filter_config(table, tmp_path, target_count=120)
    whole = filter_rows(config)
    before = shards(tmp_path)
    assert [len(datasets.Dataset.from_parquet(str(tmp_path / name))) for name in before] == [50, 50, 20]
    (tmp_path / "train-00001.parquet").rename(tmp_path / ".train-00001.parquet.partial")
    (tmp_path / "train-00002.parquet").unlink()
    assert filter_rows(replace(config, batch_size=100)) == whole
    assert texts(read(tmp_path)) and shards(tmp_path) == before
    assert len(datasets.load_dataset(str(tmp_path), split="train")) == 120  # the folder itself is a dataset
    assert not list(tmp_path.glob("*.partial"))


def test_wrong_settings_are_one_sentence(table, tmp_path):
    with pytest.raises(ValueError, match="no column 'score'; it has URL, TEXT, aesthetic, pwatermark,"):
        filter_rows(filter_config(table, tmp_path / "a", min_aesthetic=5.0, aesthetic_column="score"))
    with pytest.raises(ValueError, match="no column 'quality'"):
        filter_rows(filter_config(table, tmp_path / "a", target_count=5, rank_by="quality"))
    assert not (tmp_path / "a").exists()
    for absent in (f"{tmp_path}/none/*.parquet", f"{tmp_path}/none"):
        with pytest.raises(ValueError, match="can't be read: "):
            filter_rows(filter_config((None, absent), tmp_path / "a"))
    filter_rows(filter_config(table, tmp_path / "b", min_side=256))
    with pytest.raises(ValueError, match="begun with other settings .min_side 256, not 512.; give another output_dir"):
        filter_rows(filter_config(table, tmp_path / "b", min_side=512))
    with pytest.raises(ValueError, match="holds files of something else"):
        filter_rows(filter_config(table, Path(table[1]).parent))


@pytest.mark.slow
def test_the_command_prints_the_report(table, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"filter": {"dataset": table[1], "output_dir": str(tmp_path / "out"), **THRESHOLDS}}))
    result = subprocess.run(
        [sys.executable, PREPARE, "filter", "--config", recipe, "--min_side", "300", "--target_count", "20"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    config = filter_config(table, tmp_path / "direct", target_count=20, **THRESHOLDS | {"min_side": 300})
    assert json.loads(result.stdout) == filter_rows(config)
    assert texts(read(tmp_path / "out")) == texts(read(tmp_path / "direct"))


# Images and models


WORDS = ["<unk>", "<s>", "<pad>", "<image>", "USER:", "ASSISTANT:", "what", "is", "this"]
WORDS += [f"w{i}" for i in range(54)] + ["</s>"]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GRIDS = [[16, 32], [32, 16], [32, 32]]


def build_tokenizer(closes_texts):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closes_texts else "<s> $A", special_tokens=[("<s>", 1), ("</s>", len(WORDS) - 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def build_llava(next_version=False):
    """A tiny LLaVA, or LLaVA-NeXT, which spends more tokens on larger images."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": len(WORDS) - 1,
        "pad_token_id": 2,
    }
    vision = {"model_type": "clip_vision_model", **VISION}
    shared = {"vision_config": vision, "text_config": text, "image_token_index": 3}
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    options = {
        "tokenizer": build_tokenizer(closes_texts=False),
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "chat_template": CHAT_TEMPLATE,
        "num_additional_image_tokens": 1,
    }
    if next_version:
        images = LlavaNextImageProcessor(image_grid_pinpoints=GRIDS, **sizes)
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=GRIDS, **shared))
        return model.eval(), LlavaNextProcessor(image_processor=images, **options)
    model = LlavaForConditionalGeneration(LlavaConfig(**shared))
    return model.eval(), LlavaProcessor(image_processor=CLIPImageProcessor(**sizes), **options)


def build_clip():
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": len(WORDS) - 1,
        "pad_token_id": 2,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model, CLIPProcessor(image_processor=images, tokenizer=build_tokenizer(closes_texts=True))


def picture(i):
    """Noise of its own size for each number, as the bytes of a file."""
    pixels = np.random.default_rng(i).integers(0, 256, (16 + 9 * (i % 3), 16 + 7 * (i % 4), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, (model, processor) in (("llava", build_llava()), ("clip", build_clip())):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    torch.manual_seed(1)
    head = {"weight": torch.randn(1, 12), "bias": torch.randn(1)}
    save_file(head, folder / "head.safetensors")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eleven rows; of the images, number 4 is damaged, 7 is cut off and 9 is missing."""
    content = [picture(i) for i in range(11)]
    content[4], content[7], content[9] = b"no image", content[7][:-200], None
    rows = {
        "image": [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(content)],
        "caption": [f"w{i} w{i * i % 54} w{7 * i % 54}" + " w3" * i for i in range(11)],
        "similarity": [0.25, None, math.nan, 0.3, None, 0.1, None, 0.2, None, None, None],
        "aesthetic": [None, 5.5, None, None, None, 6.5, math.nan, 4.0, None, 3.0, None],
    }
    rows["caption"][8] = None
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        similarity=datasets.Value("float64"),
        aesthetic=datasets.Value("float32"),
    )
    folder = tmp_path_factory.mktemp("images")
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "rows.parquet")
    return content, rows, str(folder)


def recaption_config(pictures, models_folder, folder, **kwargs):
    options = {"prompt": "what is this", "max_new_tokens": 6, "batch_size": 3, "rows_per_shard": 4} | kwargs
    return RecaptionConfig(dataset=pictures[2], output_dir=str(folder), model=str(models_folder / "llava"), **options)


def score_config(pictures, models_folder, folder, **kwargs):
    options = {
        "batch_size": 3,
        "rows_per_shard": 4,
        "aesthetic_head": str(models_folder / "head.safetensors"),
    } | kwargs
    return ScoreConfig(dataset=pictures[2], output_dir=str(folder), model=str(models_folder / "clip"), **options)


def read_undecoded(folder):
    rows = datasets.load_dataset("parquet", data_files=f"{folder}/train-*.parquet", split="train")
    assert rows.features["image"] == datasets.Image()
    return list(rows.cast_column("image", datasets.Image(decode=False)))


@pytest.mark.parametrize("next_version", [False, True])
def test_captions_do_not_depend_on_the_batch(next_version):
    model, processor = build_llava(next_version)
    images = [Image.open(io.BytesIO(picture(i))) for i in range(5)]
    together = caption_images(model, processor, images, "what is this", 8)
    assert together == [caption_images(model, processor, [image], "what is this", 8)[0] for image in images]
    assert len(set(together)) > 2
    if next_version:  # otherwise nothing is padded, and the test proves little
        chats = [[{"role": "user", "content": [{"type": "image", "image": image}]}] for image in images]
        lengths = {
            len(processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]) for chat in chats
        }
        assert len(lengths) > 1


def test_recaptioning_keeps_the_rows_and_adds_long_captions(pictures, models_folder, tmp_path):
    content, rows, _ = pictures
    report = recaption(recaption_config(pictures, models_folder, tmp_path))
    assert report == {"shards": 3, "rows": 11, "captioned": 8, "undecodable": 3}
    found = read_undecoded(tmp_path)
    assert [row["caption"] for row in found] == rows["caption"]
    assert [row["image"] and row["image"]["bytes"] for row in found] == content
    model, processor = build_llava()
    for data, row in zip(content, found, strict=True):
        if data in (content[4], content[7], content[9]):
            assert row["long_caption"] is None
        else:
            image = Image.open(io.BytesIO(data))
            assert [row["long_caption"]] == caption_images(model, processor, [image], "what is this", 6)


def test_captions_are_the_words_a_greedy_search_finds():
    model, processor = build_llava()
    image = Image.open(io.BytesIO(picture(0)))
    inputs = processor(images=image, text="USER: <image> what is this ASSISTANT:", return_tensors="pt")
    ids, words = inputs["input_ids"], []
    for _ in range(5):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        words.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[words[-1]]])], dim=1)
    assert len(WORDS) - 1 not in words
    expected = " ".join(WORDS[i] for i in words if i not in (1, 2, 3))
    assert caption_images(model, processor, [image], "what is this", 5) == [expected]


@pytest.mark.parametrize("stage, make_config", [(recaption, recaption_config), (score, score_config)])
def test_a_killed_stage_equals_an_uninterrupted_one(pictures, models_folder, tmp_path, stage, make_config):
    config = make_config(pictures, models_folder, tmp_path)
    report = stage(config)
    before = shards(tmp_path)
    kept = (tmp_path / "train-00000.parquet").stat().st_mtime_ns
    (tmp_path / "train-00001.parquet").rename(tmp_path / ".train-00001.parquet.partial")
    (tmp_path / "train-00002.parquet").unlink()
    assert stage(config) == report
    assert shards(tmp_path) == before
    assert (tmp_path / "train-00000.parquet").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="begun with other settings .rows_per_shard 4, not 5."):
        stage(replace(config, rows_per_shard=5))


def expected_scores(content, caption, head):
    """By CLIP's own forward pass, one row at a time."""
    model, processor = build_clip()
    words = caption.split()[:6]  # with <s> and </s>, the 8 positions of the model
    ids = torch.tensor([[1, *(WORDS.index(word) for word in words), len(WORDS) - 1]])
    pixels = processor.image_processor(Image.open(io.BytesIO(content)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
        similarity = (output.logits_per_image / model.logit_scale.exp()).item()
    return similarity, (output.image_embeds[0] @ head["weight"][0] + head["bias"]).item()


@pytest.mark.parametrize("stage, make_config", [(recaption, recaption_config), (score, score_config)])
def test_other_images_or_models_are_refused_or_begun_anew(pictures, models_folder, tmp_path, stage, make_config):
    rows, models = shutil.copytree(pictures[2], tmp_path / "rows"), shutil.copytree(models_folder, tmp_path / "models")
    config = make_config((None, None, str(rows)), models, tmp_path / "out")
    stage(config)
    before = shards(tmp_path / "out")
    stage(replace(config, dataset=str(rows / "*.parquet"), batch_size=2))  # the same
    weights = Path(config.model, "model.safetensors")
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"of the model was changed \(model.safetensors\).*--overwrite"):
        stage(config)
    table = pq.read_table(rows / "rows.parquet")
    pq.write_table(table.slice(0, 9), rows / "rows.parquet")
    with pytest.raises(ValueError, match=r"1 file of the dataset was changed \(rows.parquet\)"):
        stage(config)
    assert shards(tmp_path / "out") == before
    assert stage(replace(config, overwrite=True))["rows"] == 9
    assert shards(tmp_path / "out").keys() == before.keys() and shards(tmp_path / "out") != before
    stage(config)


def test_scores_are_filled_where_they_are_missing_and_only_there(pictures, models_folder, tmp_path):
    content, rows, _ = pictures
    report = score(score_config(pictures, models_folder, tmp_path))
    assert report == {
        "shards": 3, "rows": 11, "undecodable": 2, "similarity_computed": 4, "similarity_missing": 3,
        "aesthetic_computed": 6, "aesthetic_missing": 1,
    }  # fmt: skip
    torch.manual_seed(1)
    head = {"weight": torch.randn(1, 12), "bias": torch.randn(1)}
    found = read_undecoded(tmp_path)
    assert [row["image"] and row["image"]["bytes"] for row in found] == content
    for i, row in enumerate(found):
        known = {name: rows[name][i] for name in ("similarity", "aesthetic")}
        if i in (4, 7, 9):
            computed = {"similarity": None, "aesthetic": None}
        else:
            computed = dict(zip(known, expected_scores(content[i], rows["caption"][i] or "", head), strict=True))
        if rows["caption"][i] is None:
            computed["similarity"] = None
        for name, value in known.items():
            if value is not None and not math.isnan(value):
                assert row[name] == value
            elif computed[name] is None:
                assert row[name] is None
            else:
                assert row[name] == pytest.approx(computed[name], abs=1e-5)


def test_columns_that_are_not_there_are_added(pictures, models_folder, tmp_path):
    config = score_config(pictures, models_folder, tmp_path, scores=["aesthetic"], aesthetic_column="beauty")
    report = score(config)
    assert report == {"shards": 3, "rows": 11, "undecodable": 3, "aesthetic_computed": 8, "aesthetic_missing": 3}
    rows = read_undecoded(tmp_path)
    assert [i for i, row in enumerate(rows) if row["beauty"] is None] == [4, 7, 9]
    assert [row["aesthetic"] for row in rows[:2]] == [None, 5.5]


def test_a_stage_reads_what_another_wrote(pictures, models_folder, tmp_path):
    recaption(recaption_config(pictures, models_folder, tmp_path / "long"))
    config = score_config(pictures, models_folder, tmp_path / "scored", caption_column="long_caption")
    score(replace(config, dataset=str(tmp_path / "long")))
    options = {"valid_url": False, "min_similarity": -1.0, "min_aesthetic": -100.0}
    report = filter_rows(filter_config((None, str(tmp_path / "scored")), tmp_path / "kept", **options))
    assert report["kept"] == 9 and report["missing"] == {"aesthetic": 1, "similarity": 1}
    rows = datasets.load_dataset(str(tmp_path / "kept"), split="train")
    assert rows[0]["image"].size == (16, 16) and rows[0]["long_caption"]


def test_images_are_read_from_tar_files_and_folders(pictures, models_folder, tmp_path):
    """As img2dataset writes them, and as plain files."""
    content = {f"{i:05d}": pictures[0][i] for i in range(6)}  # number 4 is damaged
    (tmp_path / "files").mkdir()
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in content.items():
            (tmp_path / "files" / f"{name}.png").write_bytes(data)
            for suffix, part in ((".png", data), (".txt", b"w1")):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    for source, column in (("*.tar", "png"), ("files", "image")):
        config = recaption_config(pictures, models_folder, tmp_path / f"from-{column}", image_column=column)
        report = recaption(replace(config, dataset=str(tmp_path / source)))
        files = {"images": 6, "used": 6, "left_out": {}}
        assert report.pop("files", None) == (None if column == "png" else files)
        assert report == {"shards": 2, "rows": 6, "captioned": 5, "undecodable": 1}
        rows = datasets.load_dataset(config.output_dir, split="train")
        cells = rows.cast_column(column, datasets.Image(decode=False))[column]
        assert [cell["bytes"] for cell in cells] == list(content.values())
        assert column == "image" or set(rows["txt"]) == {"w1"}


def test_images_that_metadata_name_but_are_absent_are_counted(models_folder, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture(0))
    lines = [{"file_name": name, "caption": name} for name in ("a.png", "absent.png")]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = recaption_config((None, None, str(tmp_path / "in")), models_folder, tmp_path / "out")
    report = recaption(config)
    assert report.pop("files")["used"] == 1
    assert report == {"shards": 1, "rows": 2, "captioned": 1, "undecodable": 1}
    assert [row["image"] and row["image"]["bytes"] for row in read_undecoded(tmp_path / "out")] == [picture(0), None]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_second_predictor_of_laion_is_a_chain_of_linear_layers(tmp_path, suffix):
    widths, weights, values = [12, 10, 8, 6, 4, 1], {}, torch.randn(3, 12)
    expected = values
    for i, name in enumerate((0, 2, 4, 6, 7)):
        weights[f"layers.{name}.weight"] = torch.randn(widths[i + 1], widths[i])
        weights[f"layers.{name}.bias"] = torch.randn(widths[i + 1])
        expected = expected @ weights[f"layers.{name}.weight"].T + weights[f"layers.{name}.bias"]
    path = tmp_path / f"head{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    torch.testing.assert_close(load_aesthetic_head(str(path), 12)(values), expected)
    with pytest.raises(ValueError, match="is for embeddings of width 12, but CLIP's have 16"):
        load_aesthetic_head(str(path), 16)


def test_other_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no file './absent.pth'"):
        load_aesthetic_head("./absent.pth", 12)
    path = tmp_path / "with_relu.safetensors"
    save_file({"layers.0.weight": torch.zeros(1, 12), "layers.3.weight": torch.zeros(1, 1)}, path)
    with pytest.raises(ValueError, match="not one of LAION's linear aesthetic predictors; it holds layers.0.weight,"):
        load_aesthetic_head(str(path), 12)


def test_wrong_columns_of_images_are_one_sentence(pictures, models_folder, tmp_path):
    with pytest.raises(ValueError, match="no column 'jpg'; it has image, caption, similarity, aesthetic"):
        recaption(recaption_config(pictures, models_folder, tmp_path, image_column="jpg"))
    with pytest.raises(ValueError, match="already has a column 'caption'; name another one"):
        recaption(recaption_config(pictures, models_folder, tmp_path, long_caption_column="caption"))
    with pytest.raises(ValueError, match="no column 'text'"):
        score(score_config(pictures, models_folder, tmp_path, caption_column="text"))
    with pytest.raises(ValueError, match="There is no score 'beauty'; `scores` takes similarity and aesthetic"):
        score(score_config(pictures, models_folder, tmp_path, scores=["beauty"]))


@pytest.mark.slow
@pytest.mark.parametrize("stage, make_config", [("recaption", recaption_config), ("score", score_config)])
def test_processes_share_out_the_shards(pictures, models_folder, tmp_path, stage, make_config):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({stage: vars(make_config(pictures, models_folder, tmp_path / "two"))}))
    result = launch(PREPARE, stage, "--config", recipe)
    run = {"recaption": recaption, "score": score}[stage]
    assert json.loads(result.stdout) == run(make_config(pictures, models_folder, tmp_path / "one"))
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
