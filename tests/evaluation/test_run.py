"""One evaluation from its beginning to its report, with tiny pipelines and features that need no weights."""

import json

import numpy as np
import pytest
from launching import torchrun
from PIL import Image
from tiny import build_class_pipeline, build_clip, build_text_pipeline
from tiny_evaluation import Thumbnails, build_dit_pipeline
from torch.nn import functional as F
from typer.testing import CliRunner

import llamagen_cli
from llamagen_cli.evaluate import read_arguments, read_prompts
from llamagen_hf.evaluation import inception
from llamagen_hf.evaluation import statistics as statistics_module
from llamagen_hf.evaluation.npz import write_images
from llamagen_hf.evaluation.run import EvaluationConfig, evaluate, is_checkpoint
from llamagen_hf.evaluation.text import embed_pairs


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(statistics_module, "cached_assets_path", lambda *_, **__: tmp_path / "cache")


@pytest.fixture
def reference(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    write_images(tmp_path / "reference.npz", values, 9)
    return str(tmp_path / "reference.npz")


def run(tmp_path, reference, *subjects, **settings):
    config = EvaluationConfig([*map(str, subjects)], reference, str(tmp_path / "out"), **settings)
    return evaluate(config, Thumbnails(), progress=False)


def test_a_checkpoint_images_and_the_reference_itself_on_one_table(tmp_path, reference):
    build_class_pipeline().save_pretrained(tmp_path / "own")
    folder = tmp_path / "images"
    folder.mkdir()
    for index, shade in enumerate((10, 90, 150, 200)):
        Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(folder / f"{index}.png")
    own, images, itself = run(tmp_path, reference, tmp_path / "own", folder, reference, classes="balanced")
    assert [result["title"] for result in (own, images, itself)] == ["own", "images", "reference.npz"]
    assert itself["metrics"]["fid"] == pytest.approx(0, abs=1e-12) and itself["metrics"]["precision"] == 1
    assert own["count"] == 9 and images["count"] == 4  # as many as the reference has, and as there are
    assert own["sampling"]["guidance_scale"] == 4.0 and own["sampling"]["conditions"] == "balanced classes"
    assert "sampling" not in images
    assert own["reference"] == {"name": "reference.npz", "count": 9}
    again = run(tmp_path, reference, own["samples"])[0]  # the generated images, as images
    assert again["metrics"] == own["metrics"]


def test_guidance_scales_become_a_sweep(tmp_path, reference):
    build_class_pipeline().save_pretrained(tmp_path / "own")
    (result,) = run(tmp_path, reference, tmp_path / "own", guidance_scales=[1.0, 3.0], count=6)
    assert [point["guidance_scale"] for point in result["sweep"]] == [1.0, 3.0]
    best = min(result["sweep"], key=lambda point: point["fid"])
    assert result["metrics"]["fid"] == best["fid"] and result["sampling"]["guidance_scale"] == best["guidance_scale"]


def test_autoregressive_against_diffusion(tmp_path, reference):
    build_class_pipeline().save_pretrained(tmp_path / "own")
    build_dit_pipeline().save_pretrained(tmp_path / "dit")
    own, dit = run(tmp_path, reference, tmp_path / "own", tmp_path / "dit", count=4, num_classes=10, image_size=8)
    assert own["metrics"].keys() == dit["metrics"].keys() >= {"fid", "sfid", "precision", "recall", "kid"}
    assert own["image_size"] == dit["image_size"] == [8, 8]
    assert own["metrics"]["fid"] != dit["metrics"]["fid"]


def test_the_command_shows_which_prompts_fit_worst_and_best(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(inception, "InceptionFeatures", lambda *_: Thumbnails())
    build_text_pipeline().save_pretrained(tmp_path / "text")
    model, processor = build_clip()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "clip")
    prompts = ["a cat", "a red apple", "a tree", "a cat"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    command = ["evaluate", str(tmp_path / "text"), "--reference", reference, "--output", str(tmp_path / "out")]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--clip", str(tmp_path / "clip"), "--count", "8"]
    result = CliRunner().invoke(llamagen_cli.app, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "text" / "report.json").read_text())
    assert report["score_metric"] == "clip_score"
    files = sorted((tmp_path / "out" / "samples" / "text").glob("*.png"))
    embeddings = [
        F.normalize(part, dim=-1) for part in embed_pairs(map(Image.open, files), 2 * prompts, *build_clip())[:2]
    ]
    cosines = 100 * embeddings[0] @ embeddings[1].T
    for row, entry in enumerate(report["scores"]):
        own = [index for index in range(8) if prompts[index % 4] == entry["name"]]
        assert entry["score"] == pytest.approx(cosines[own, row].mean().item(), abs=1e-3)
    assert [entry["name"] for entry in report["scores"]] == ["a cat", "a red apple", "a tree"]
    page = (tmp_path / "out" / "text" / "report.html").read_text()
    # The sheet's eight, then the worst and the best prompt's.
    assert page.count("data:image/webp") == 10


def test_other_weights_in_the_same_folder_are_not_measured_by_the_old_images(tmp_path, reference, monkeypatch):
    pipe = build_class_pipeline()
    pipe.save_pretrained(tmp_path / "own")
    (first,) = run(tmp_path, reference, tmp_path / "own", count=4)
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, reference, "own", count=4)[0]["metrics"] == first["metrics"]
    pipe.transformer.lm_head.weight.data.neg_()
    pipe.save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="other input: the weights of transformer changed"):
        run(tmp_path, reference, tmp_path / "own", count=4)
    monkeypatch.setattr(inception, "InceptionFeatures", lambda *_: Thumbnails())
    command = ["evaluate", "own", "--reference", reference, "--output", str(tmp_path / "out"), "--count", "4"]
    assert "start over with --overwrite" in " ".join(CliRunner().invoke(llamagen_cli.app, command).output.split())
    result = CliRunner().invoke(llamagen_cli.app, [*command, "--overwrite"])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "own" / "report.json").read_text())
    assert report["metrics"]["fid"] != first["metrics"]["fid"]


def test_two_subjects_of_one_name_would_share_a_folder(tmp_path, reference):
    with pytest.raises(ValueError, match="Two subjects are called 'own'"):
        run(tmp_path, reference, tmp_path / "a" / "own", tmp_path / "b" / "own")


def test_prompts_repeat_in_order(tmp_path, reference):
    build_text_pipeline().save_pretrained(tmp_path / "text")
    (result,) = run(tmp_path, reference, tmp_path / "text", prompts=["a cat", "a red apple"], count=5)
    assert result["count"] == 5 and result["sampling"]["conditions"] == "2 prompts"


def test_presets_bring_settings_and_refuse_other_references(tmp_path, reference):
    build_class_pipeline().save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="'reference.npz' is another reference"):
        run(tmp_path, reference, tmp_path / "own", preset="imagenet256_paper", image_size=8)
    (result,) = run(tmp_path, reference, tmp_path / "own", preset="demo", count=4)
    assert result["sampling"]["top_k"] == 2000 and result["sampling"]["guidance_scale"] == 4.0


WORKER = """
import json, sys
from tiny_evaluation import Thumbnails
from llamagen_hf.evaluation.run import EvaluationConfig, evaluate
from llamagen_hf.processes import leave_processes, this_process

subject, reference, output, report = sys.argv[1:]
config = EvaluationConfig([subject], reference, output, guidance_scales=[1.0, 3.0])
results = evaluate(config, Thumbnails(), progress=False)
if this_process().is_main_process:
    with open(report, "w") as file:
        json.dump(results, file, default=str)
leave_processes()
"""


@pytest.mark.slow
def test_two_processes_generate_and_one_measures(tmp_path, reference, monkeypatch):
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "cache"))
    build_class_pipeline().save_pretrained(tmp_path / "own")
    (tmp_path / "worker.py").write_text(WORKER)
    for count in (1, 2):
        folder = tmp_path / str(count)
        torchrun(tmp_path / "worker.py", tmp_path / "own", reference, folder, f"{folder}.json", processes=count)
    ((one,), (two,)) = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert one["sweep"] == two["sweep"] and one["metrics"] == two["metrics"]


def test_what_is_a_checkpoint(tmp_path):
    build_class_pipeline().save_pretrained(tmp_path / "own")
    assert is_checkpoint(str(tmp_path / "own")) and is_checkpoint("emoji") and is_checkpoint("user/model")
    assert not is_checkpoint(str(tmp_path)) and not is_checkpoint("./nowhere") and not is_checkpoint("batch.npz")


def test_missing_subjects_are_named(tmp_path, reference):
    with pytest.raises(ValueError, match="there is no such folder"):
        run(tmp_path, reference, "./nowhere")
    with pytest.raises(OSError, match="There is no file"):
        run(tmp_path, "missing.npz", "emoji")


def test_arguments_and_prompts_of_the_command_line(tmp_path):
    assert read_arguments(["top_k=0", "top_p=0.5", "negative_prompt=none at all", "clean=true"]) == {
        "top_k": 0,
        "top_p": 0.5,
        "negative_prompt": "none at all",
        "clean": True,
    }
    (tmp_path / "prompts.txt").write_text("a cat\n\n  the sun \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "the sun"]
    for words, message, exit_code in (
        (["--argument", "top_k"], "expected name=value", 1),
        (["--prompts", str(tmp_path / "none.txt")], "can't be read", 1),
        (["--dtype", "float8"], "'float8' is not one of 'float32', 'float16', 'bfloat16'", 2),
        (["--classes", "all"], "'all' is not one of 'random', 'balanced'", 2),
        (["--preset", "paper"], "'paper' is not one of 'imagenet256_paper', 'demo'", 2),
    ):
        command = ["evaluate", "emoji", "--reference", "a.npz", "--output", str(tmp_path / "out"), *words]
        result = CliRunner().invoke(llamagen_cli.app, command)
        output = " ".join(result.output.replace("│", " ").split())
        assert result.exit_code == exit_code and message in output, result.output
