"""The filter of a table: which rows it keeps, and what a run that was killed loses."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_stages import PREPARE, filter_config, shards  # noqa: E402

from llamagen_hf.data import filtering  # noqa: E402
from llamagen_hf.data import shards as tables  # noqa: E402
from llamagen_hf.data.filtering import FilterConfig, filter_rows, find_cutoff  # noqa: E402


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


def read(folder):
    return list(datasets.load_dataset("parquet", data_files=f"{folder}/train-*.parquet", split="train"))


def texts(rows):
    return [row["TEXT"] for row in rows]


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


def test_a_filter_of_other_rows_is_refused_or_begun_anew(tmp_path):
    def write(scores):
        rows = [{"URL": f"http://a.example/{score}", "aesthetic": float(score)} for score in scores]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")

    config = FilterConfig(str(tmp_path / "rows.parquet"), str(tmp_path / "out"), rows_per_shard=2, target_count=4)
    write(range(9))
    assert filter_rows(config)["threshold"] == 5
    assert filter_rows(replace(config, dataset=f"{tmp_path}/*.parquet"))["kept"] == 4
    write(range(20, 29))
    with pytest.raises(ValueError, match=r"1 file of the dataset was changed \(rows.parquet\).*--overwrite"):
        filter_rows(config)
    (tmp_path / "out" / "mine.parquet").write_bytes(b"foreign")
    with pytest.raises(ValueError, match="holds files of something else"):
        filter_rows(replace(config, overwrite=True))
    assert (tmp_path / "out" / "mine.parquet").read_bytes() == b"foreign"
    (tmp_path / "out" / "mine.parquet").unlink()
    assert filter_rows(replace(config, overwrite=True))["threshold"] == 25
    assert [row["aesthetic"] for row in read(tmp_path / "out")] == [25, 26, 27, 28]
