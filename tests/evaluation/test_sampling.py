"""Generating many images: by index, on any number of processes; with our pipelines and those of diffusers."""

import json

import numpy as np
import pytest
import torch
from launching import launch
from PIL import Image
from tiny import build_class_pipeline, build_text_pipeline, generators
from tiny_evaluation import build_dit_pipeline

from llamagen_hf.evaluation.presets import PRESETS, check_reference, get_preset
from llamagen_hf.evaluation.sampling import SamplingConfig, pack_images, sample_images
from llamagen_hf.evaluation.statistics import ImageStatistics


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def draw(pipe, folder, count=7, batch_size=3, **kwargs):
    return sample_images(pipe, SamplingConfig(count, batch_size=batch_size, **kwargs), folder, progress=False)


def test_images_are_those_of_the_pipeline_with_the_seed_of_their_index(tmp_path):
    pipe = build_class_pipeline()
    draw(pipe, tmp_path / "own", classes="balanced", arguments={"guidance_scale": 2.0}, seed=5)
    assert len(contents(tmp_path / "own")) == 7
    for index in (0, 3, 6):
        expected = pipe(class_labels=index, guidance_scale=2.0, generator=generators(5 + index)).images[0]
        with Image.open(tmp_path / "own" / f"{index:06d}.png") as image:
            assert np.array_equal(np.array(image), np.array(expected))


def test_prompts_repeat(tmp_path):
    pipe = build_text_pipeline()
    prompts = ["a red apple", "a cat", "the sun"]
    draw(pipe, tmp_path / "own", prompts=prompts)
    for index in (2, 4):
        expected = pipe(prompts[index % 3], generator=generators(index)).images[0]
        with Image.open(tmp_path / "own" / f"{index:06d}.png") as image:
            assert np.array_equal(np.array(image), np.array(expected))


def test_random_classes_do_not_depend_on_count_or_batches(tmp_path):
    pipe, seen = build_class_pipeline(), {}
    prepare = pipe.prepare
    for name, count, batch_size in (("few", 4, 2), ("many", 9, 3)):
        labels = seen.setdefault(name, [])
        pipe.prepare = lambda inputs, labels=labels: labels.extend(inputs.class_labels) or prepare(inputs)
        draw(pipe, tmp_path / name, count, batch_size)
    assert seen["few"] == seen["many"][:4] and len(set(seen["many"])) > 2


def test_a_killed_run_resumes_and_ends_with_the_same_images(tmp_path):
    pipe = build_class_pipeline()
    whole = contents(draw(pipe, tmp_path / "whole"))
    cut = draw(pipe, tmp_path / "cut")
    for index in (1, 5, 6):
        (cut / f"{index:06d}.png").unlink()
    (cut / ".000001.png.123").write_bytes(b"half")
    untouched = (cut / "000004.png").stat().st_mtime_ns
    calls = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    assert contents(draw(pipe, cut)) | whole == whole
    steps = len(calls)
    draw(pipe, cut)
    assert len(calls) == steps > 0  # nothing was left to do
    assert (cut / "000000.png").is_file() and (cut / "000004.png").stat().st_mtime_ns >= untouched


def test_a_folder_of_other_images_is_refused(tmp_path):
    pipe = build_class_pipeline()
    draw(pipe, tmp_path / "own")
    with pytest.raises(ValueError, match="generated with another arguments, seed; take another folder"):
        draw(pipe, tmp_path / "own", seed=3, arguments={"top_k": 5})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.png").write_bytes(b"")
    with pytest.raises(ValueError, match="is not empty and holds no images that were generated"):
        draw(pipe, tmp_path / "foreign")


def test_a_complete_folder_is_packed_in_order(tmp_path):
    pipe = build_class_pipeline()
    folder = draw(pipe, tmp_path / "own")
    pack_images(folder, tmp_path / "samples.npz")
    packed = np.load(tmp_path / "samples.npz")["arr_0"]
    assert packed.shape == (7, 8, 8, 3)
    with Image.open(folder / "000006.png") as image:
        assert np.array_equal(packed[6], np.array(image))
    (folder / "000003.png").unlink()
    with pytest.raises(ValueError, match="holds 6 of 7 images"):
        pack_images(folder, tmp_path / "other.npz")
    with pytest.raises(OSError, match="holds no images that were generated for an evaluation"):
        pack_images(tmp_path, tmp_path / "other.npz")


def test_images_are_resized_before_they_are_clamped(tmp_path):
    pipe = build_class_pipeline()
    folder = draw(pipe, tmp_path / "own", count=2, classes="balanced", image_size=4)
    codes = pipe(class_labels=1, generator=generators(1), output_type="codes").images
    with torch.no_grad():
        pixels = pipe.vq_model.decode_codes(codes)
    pixels = torch.nn.functional.interpolate(pixels, size=(4, 4), mode="bicubic")[0].permute(1, 2, 0)
    expected = (pixels.numpy() * 127.5 + 128).clip(0, 255).astype(np.uint8)
    with Image.open(folder / "000001.png") as image:
        assert image.size == (4, 4) and np.array_equal(np.array(image), expected)


def test_a_diffusion_pipeline_generates_classes_by_the_same_rules(tmp_path):
    pipe = build_dit_pipeline()
    settings = {"classes": "balanced", "arguments": {"num_inference_steps": 2, "guidance_scale": 2.0}}
    whole = contents(draw(pipe, tmp_path / "own", count=4, batch_size=2, **settings))
    assert len(set(whole.values())) == 4
    assert contents(draw(pipe, tmp_path / "again", count=4, batch_size=2, **settings)) == whole
    for index in (0, 1):
        pair = pipe([0, 1], generator=generators(0, 1), output_type="np", num_inference_steps=2, guidance_scale=2.0)
        with Image.open(tmp_path / "own" / f"{index:06d}.png") as image:
            assert np.abs(np.array(image) / 255 - pair.images[index]).max() < 0.51 / 255


def test_conditions_that_a_pipeline_does_not_take_are_refused(tmp_path):
    for pipe, settings, message in (
        (build_text_pipeline(), {}, "does not take classes; give it prompts"),
        (build_class_pipeline(), {"prompts": ["a cat"]}, "does not take prompts; leave them out"),
        (build_dit_pipeline(), {"prompts": ["a cat"]}, "DiTPipeline does not take prompts"),
        (build_dit_pipeline(), {"arguments": {"top_k": 3}}, "DiTPipeline does not take top_k"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, tmp_path / "own", **settings)
    assert not (tmp_path / "own").exists()
    for settings, message in (
        ({"count": 0}, "`count` is 0"),
        ({"classes": "all"}, "`classes` is 'all'"),
        ({"prompts": []}, "`prompts` is empty"),
        ({"batch_size": 1.5}, "`batch_size` is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**{"count": 3} | settings)


def statistics(name, count=10_000, side=256):
    return ImageStatistics(name, count, (side, side), pool=None)


def test_the_papers_preset_refuses_references_that_do_not_fit():
    preset = get_preset("imagenet256_paper")
    check_reference(preset, statistics("VIRTUAL_imagenet256_labeled.npz"), 50_000)
    check_reference(preset, statistics("VIRTUAL_imagenet256_labeled.npz", count=0), 50_000)
    for reference, samples, message in (
        (statistics("val_256.npz", 50_000), 50_000, "is the ImageNet validation batch, right for rFID, wrong for FID"),
        (statistics("VIRTUAL_imagenet512.npz", side=512), 50_000, "is another reference: the preset compares with"),
        (statistics("VIRTUAL_imagenet256_labeled.npz", side=128), 50_000, "128 x 128 pixels, not 256"),
        (statistics("VIRTUAL_imagenet256_labeled.npz", count=5_000), 50_000, "holds 5,000 images, not 10,000"),
        (statistics("VIRTUAL_imagenet256_labeled.npz"), 10_000, "There are 10,000 samples; the preset's numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            check_reference(preset, reference, samples)
    check_reference(get_preset("demo"), statistics("anything", 3, 8), 2)
    with pytest.raises(ValueError, match="There is no preset 'paper'; there are imagenet256_paper, demo"):
        get_preset("paper")
    assert PRESETS["imagenet256_paper"].sampling == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


WORKER = """
import sys
from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.evaluation.sampling import SamplingConfig, sample_images
from llamagen_hf.processes import leave_processes
pipe = AutoregressiveImagePipeline.from_pretrained(sys.argv[1])
sample_images(pipe, SamplingConfig(11, batch_size=2), sys.argv[2], progress=False)
leave_processes()
"""


@pytest.mark.slow
def test_three_processes_write_what_one_writes(tmp_path):
    build_class_pipeline().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "worker.py").write_text(WORKER)
    for count in (1, 3):
        launch(tmp_path / "worker.py", tmp_path / "checkpoint", tmp_path / str(count), processes=count)
    one, three = contents(tmp_path / "1"), contents(tmp_path / "3")
    assert len(one) == 11 and one == three
    assert json.loads((tmp_path / "3" / "sampling.json").read_text())["count"] == 11


def test_images_of_other_weights_are_refused_or_drawn_anew(tmp_path):
    pipe = build_class_pipeline()

    def drawn(folder, **kwargs):
        draw(pipe, tmp_path / folder, count=4, batch_size=2, **kwargs)
        return contents(tmp_path / folder)

    first = drawn("out")
    pipe.transformer.lm_head.weight.data.neg_()
    with pytest.raises(ValueError, match="other input: the weights of transformer changed.*--overwrite"):
        drawn("out")
    second = drawn("out", overwrite=True)
    assert second != first and second == drawn("out") == drawn("fresh")
    (tmp_path / "out" / ".inputs.json").unlink()
    with pytest.raises(ValueError, match="does not say what it was made from"):
        drawn("out")
    drawn("out", overwrite=True, seed=4)


def test_what_is_no_evaluation_is_never_removed(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not empty and holds no images that were generated"):
        draw(build_class_pipeline(), tmp_path, overwrite=True)
    assert (tmp_path / "000000.png").read_bytes() == b"mine"
