"""CLIP similarities and aesthetic scores: filled in where they are missing, and only there."""

import io
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_stages import (  # noqa: E402
    WORDS,
    build_clip,
    read_undecoded,
    score_config,
)

from llamagen_hf.data.scoring import load_aesthetic_head, score  # noqa: E402


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


def test_scores_are_filled_where_they_are_missing_and_only_there(images, models_folder, tmp_path):
    content, rows, _ = images
    report = score(score_config(images, models_folder, tmp_path))
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


def test_columns_that_are_not_there_are_added(images, models_folder, tmp_path):
    config = score_config(images, models_folder, tmp_path, scores=["aesthetic"], aesthetic_column="beauty")
    report = score(config)
    assert report == {"shards": 3, "rows": 11, "undecodable": 3, "aesthetic_computed": 8, "aesthetic_missing": 3}
    rows = read_undecoded(tmp_path)
    assert [i for i, row in enumerate(rows) if row["beauty"] is None] == [4, 7, 9]
    assert [row["aesthetic"] for row in rows[:2]] == [None, 5.5]


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
