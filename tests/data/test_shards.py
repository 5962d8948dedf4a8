"""What the stages of the preparation share: they go on, refuse other input, and share out their shards."""

import io
import json
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from launching import launch
from safetensors.torch import load_file, save_file


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

import pyarrow.parquet as pq  # noqa: E402
from tiny_stages import (  # noqa: E402
    PREPARE,
    filter_config,
    image_bytes,
    read_undecoded,
    recaption_config,
    score_config,
    shards,
)

from llamagen_hf.arguments import FieldError  # noqa: E402
from llamagen_hf.data.filtering import filter_rows  # noqa: E402
from llamagen_hf.data.recaptioning import recaption  # noqa: E402
from llamagen_hf.data.scoring import ScoreConfig, score  # noqa: E402
from llamagen_hf.training.recipe import parse_recipe  # noqa: E402


@pytest.mark.parametrize("stage, make_config", [(recaption, recaption_config), (score, score_config)])
def test_a_killed_stage_equals_an_uninterrupted_one(images, models_folder, tmp_path, stage, make_config):
    config = make_config(images, models_folder, tmp_path)
    report = stage(config)
    before = shards(tmp_path)
    kept = (tmp_path / "train-00000.parquet").stat().st_mtime_ns
    (tmp_path / "train-00001.parquet").rename(tmp_path / ".train-00001.parquet.partial")
    (tmp_path / "train-00002.parquet").rename(tmp_path / ".train-00002.parquet.1a2b.partial")
    assert stage(config) == report
    assert not list(tmp_path.glob("*.partial"))
    assert shards(tmp_path) == before
    assert (tmp_path / "train-00000.parquet").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="begun with other settings .rows_per_shard 4, not 5."):
        stage(replace(config, rows_per_shard=5))


@pytest.mark.parametrize("stage, make_config", [(recaption, recaption_config), (score, score_config)])
def test_other_images_or_models_are_refused_or_begun_anew(images, models_folder, tmp_path, stage, make_config):
    rows, models = shutil.copytree(images[2], tmp_path / "rows"), shutil.copytree(models_folder, tmp_path / "models")
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


def test_a_stage_reads_what_another_wrote(images, models_folder, tmp_path):
    recaption(recaption_config(images, models_folder, tmp_path / "long"))
    config = score_config(images, models_folder, tmp_path / "scored", caption_column="long_caption")
    score(replace(config, dataset=str(tmp_path / "long")))
    options = {"valid_url": False, "min_similarity": -1.0, "min_aesthetic": -100.0}
    report = filter_rows(filter_config((None, str(tmp_path / "scored")), tmp_path / "kept", **options))
    assert report["kept"] == 9 and report["missing"] == {"aesthetic": 1, "similarity": 1}
    rows = datasets.load_dataset(str(tmp_path / "kept"), split="train")
    assert rows[0]["image"].size == (16, 16) and rows[0]["long_caption"]


def test_images_are_read_from_tar_files_and_folders(images, models_folder, tmp_path):
    """As img2dataset writes them, and as plain files."""
    content = {f"{i:05d}": images[0][i] for i in range(6)}  # number 4 is damaged
    (tmp_path / "files").mkdir()
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in content.items():
            (tmp_path / "files" / f"{name}.png").write_bytes(data)
            for suffix, part in ((".png", data), (".txt", b"w1")):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))
    for source, column in (("*.tar", "png"), ("files", "image")):
        config = recaption_config(images, models_folder, tmp_path / f"from-{column}", image_column=column)
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
    (tmp_path / "in" / "a.png").write_bytes(image_bytes(0))
    lines = [{"file_name": name, "caption": name} for name in ("a.png", "absent.png")]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = recaption_config((None, None, str(tmp_path / "in")), models_folder, tmp_path / "out")
    report = recaption(config)
    assert report.pop("files")["used"] == 1
    assert report == {"shards": 1, "rows": 2, "captioned": 1, "undecodable": 1}
    assert [row["image"] and row["image"]["bytes"] for row in read_undecoded(tmp_path / "out")] == [
        image_bytes(0),
        None,
    ]


def test_wrong_columns_of_images_are_one_sentence(images, models_folder, tmp_path):
    with pytest.raises(ValueError, match="no column 'jpg'; it has image, caption, similarity, aesthetic"):
        recaption(recaption_config(images, models_folder, tmp_path, image_column="jpg"))
    with pytest.raises(ValueError, match="already has a column 'caption'; name another one"):
        recaption(recaption_config(images, models_folder, tmp_path, long_caption_column="caption"))
    with pytest.raises(ValueError, match="no column 'text'"):
        score(score_config(images, models_folder, tmp_path, caption_column="text"))
    with pytest.raises(ValueError, match="There is no score 'beauty'; `scores` takes similarity and aesthetic"):
        score(score_config(images, models_folder, tmp_path, scores=["beauty"]))


@pytest.mark.slow
@pytest.mark.parametrize("stage, make_config", [("recaption", recaption_config), ("score", score_config)])
def test_processes_share_out_the_shards(images, models_folder, tmp_path, stage, make_config):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({stage: vars(make_config(images, models_folder, tmp_path / "two"))}))
    result = launch(PREPARE, stage, "--config", recipe)
    run = {"recaption": recaption, "score": score}[stage]
    assert json.loads(result.stdout) == run(make_config(images, models_folder, tmp_path / "one"))
    assert shards(tmp_path / "two") == shards(tmp_path / "one")


def test_choices_are_checked_in_recipes_flags_and_python(images, models_folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    config = vars(score_config(images, models_folder, tmp_path / "out"))
    recipe.write_text(json.dumps({"score": config}))
    arguments = ("", ("score", ScoreConfig))
    (found,) = parse_recipe(*arguments, args=["--config", str(recipe), "--dtype", "bfloat16"])
    assert found == ScoreConfig(**config | {"dtype": "bfloat16"})
    with pytest.raises(FieldError, match="dtype is 'int8'; expected 'float32', 'bfloat16' or 'float16'.") as error:
        ScoreConfig(**config | {"dtype": "int8"})
    assert error.value.field == "dtype"
    with pytest.raises(SystemExit):
        parse_recipe(*arguments, args=["--config", str(recipe), "--dtype", "int8"])
    assert re.search("--dtype: invalid choice: 'int8' .*bfloat16", capsys.readouterr().err)
    recipe.write_text(json.dumps({"score": config | {"dtype": "int8"}}))
    with pytest.raises(SystemExit):
        parse_recipe(*arguments, args=["--config", str(recipe)])
    assert re.search("dtype.*'int8'.*bfloat16", capsys.readouterr().err)
