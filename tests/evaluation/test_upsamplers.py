"""Upsamplers beside bicubic enlargement, and pixel diffusion in evaluations."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import build_class_pipeline, build_vq_model
from tiny_cascade import build_cascade
from tiny_diffusion import build_diffusion_pipeline
from tiny_evaluation import Thumbnails
from typer.testing import CliRunner


pytest.importorskip("datasets", reason="the training extra is not installed")

import llamagen_cli  # noqa: E402
from llamagen_hf.evaluation import statistics  # noqa: E402
from llamagen_hf.evaluation.npz import write_images  # noqa: E402
from llamagen_hf.evaluation.reconstruction import PerceptualLoss, psnr, ssim  # noqa: E402
from llamagen_hf.evaluation.run import EvaluationConfig, evaluate  # noqa: E402
from llamagen_hf.evaluation.sampling import SamplingConfig, sample_images  # noqa: E402
from llamagen_hf.evaluation.upsamplers import compare_upsamplers, evaluate_upsampler  # noqa: E402
from llamagen_hf.evaluation.upsampling import Enlarged, evaluate_upsampling, measure_consistency  # noqa: E402


@pytest.fixture(scope="module")
def upsampler():
    return build_diffusion_pipeline(upsamples=True)


def some_images(count: int = 5, size: int = 16) -> np.ndarray:
    """Smooth images, which bicubic enlargement can do something with."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (size, size), mode="bilinear") * 255
    return smooth.permute(0, 2, 3, 1).byte().numpy()


def measure(pipe, images=None, small_size=8, **kwargs):
    images = some_images() if images is None else images
    return evaluate_upsampler(pipe, images, small_size, progress=False, **kwargs)


def test_the_numbers_are_those_of_the_pipeline_and_of_bicubic_enlargement(upsampler):
    torch.manual_seed(0)
    lpips = PerceptualLoss()
    result = measure(upsampler, batch_size=2, seed=7, extractor=Thumbnails(), perceptual_loss=lpips, aug_level=0.2)
    images = torch.from_numpy(some_images()).permute(0, 3, 1, 2).float() / 255
    small = F.avg_pool2d(images, 2)
    generators = [torch.Generator().manual_seed(7 + index) for index in range(5)]
    own = upsampler(image=small, generator=generators, aug_level=0.2, output_type="pt").images
    for kind, large in (("", own), ("_bicubic", F.interpolate(small, (16, 16), mode="bicubic").clamp(0, 1))):
        assert result[f"psnr{kind}"] == pytest.approx(psnr(large, images).mean().item(), abs=1e-3)
        assert result[f"ssim{kind}"] == pytest.approx(ssim(large, images).mean().item(), abs=1e-4)
        assert result[f"lpips{kind}"] == pytest.approx(lpips(2 * large - 1, 2 * images - 1).mean().item(), abs=1e-4)
        consistency = psnr(F.avg_pool2d(large, 2), small).mean().item()
        assert result[f"consistency{kind}"] == pytest.approx(consistency, abs=1e-3)
    assert result["psnr_bicubic"] > result["psnr"]  # its weights are random
    assert result["fid"] != result["fid_bicubic"] and result["images"] == 5
    assert measure(upsampler, batch_size=5, seed=7, aug_level=0.2)["psnr"] == pytest.approx(result["psnr"], abs=1e-4)
    assert measure(upsampler, seed=8, aug_level=0.2)["psnr"] != result["psnr"]


def test_what_becomes_the_small_image_again_is_consistent():
    small = 2 * torch.rand(2, 3, 8, 8) - 1
    large = F.interpolate(small, (16, 16))  # every pixel four times
    assert measure_consistency(small, large).tolist() == [60, 60]
    changed = torch.cat([large[:1], -large[1:]])
    assert measure_consistency(small, changed)[0] == 60 > measure_consistency(small, changed)[1]
    found = evaluate_upsampling([Enlarged(small, changed, large)] * 2, torch.device("cpu"))
    assert found["consistency"] == pytest.approx(measure_consistency(small, changed).mean().item(), rel=1e-6)
    assert found["consistency_bicubic"] < 60


def test_prompts_and_redrawn_images_change_what_is_enlarged(upsampler):
    plain = measure(upsampler, count=2)
    prompted = measure(upsampler, count=2, prompts=["a red apple", "a fish"])
    redrawn = measure(upsampler, count=2, autoencoder=build_vq_model())
    assert len({result["psnr"] for result in (plain, prompted, redrawn)}) == 3
    assert redrawn["psnr_bicubic"] < plain["psnr_bicubic"] == prompted["psnr_bicubic"]


def test_the_table_has_bicubic_first():
    results = [
        {"name": "one", "psnr": 20.0, "psnr_bicubic": 22.5, "consistency": 30.0, "consistency_bicubic": 40.0},
        {"name": "two", "psnr": 25.0, "psnr_bicubic": 22.5},
    ]
    assert compare_upsamplers(results).splitlines() == [
        "| upsampler | PSNR | consistency |",
        "| :-- | --: | --: |",
        "| bicubic | 22.50 | 40.00 |",
        "| one | 20.00 | 30.00 |",
        "| two | 25.00 | – |",
    ]


def test_what_does_not_fit_is_refused(upsampler):
    plain = build_diffusion_pipeline(text=False, upsamples=True)
    for pipe, kwargs, message in (
        (build_diffusion_pipeline(), {}, "enlarges no images"),
        (build_class_pipeline(), {}, "enlarges no images"),
        (upsampler, {"small_size": 16}, "The small size is 16 pixels; .* makes 16, so expected a part of that"),
        (upsampler, {"small_size": 5}, "The small size is 5"),
        (upsampler, {"images": some_images(size=32)}, "The images are 32 x 32 pixels; .* makes 16 x 16"),
        (upsampler, {"count": 6}, "`count` is 6; 'array' has 5 images"),
        (upsampler, {"prompts": ["a fish"]}, "There are 1 prompts for 5 images"),
        (plain, {"prompts": ["a fish"] * 5}, "reads no prompts"),
        (upsampler, {"aug_level": 2.0}, "aug_level"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(pipe, **kwargs)


def test_the_command_writes_table_and_numbers(tmp_path, upsampler):
    upsampler.save_pretrained(tmp_path / "upsampler")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(some_images(3)):
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    command = ["compare-upsamplers", str(tmp_path / "images"), str(tmp_path / "upsampler"), "--steps", "2"]

    def invoke(*more):
        return CliRunner().invoke(llamagen_cli.app, [*command, *more])

    for suffix in ("md", "json"):
        result = invoke("--output", str(tmp_path / f"table.{suffix}"))
        assert result.exit_code == 0, result.output
    assert (tmp_path / "table.md").read_text() in result.output
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers["small_size"] == 8 and numbers["images"] == "images"
    (row,) = numbers["upsamplers"]
    expected = measure(upsampler, some_images(3), num_inference_steps=2)
    assert row["psnr"] == pytest.approx(expected["psnr"], abs=1e-4)
    build_diffusion_pipeline(upsamples=True, image_size=32).save_pretrained(tmp_path / "larger")
    for more, message in (
        ([str(tmp_path / "larger")], "Only upsamplers to one size can be compared"),
        (["--output", "table.txt"], "must end in .md or .json"),
    ):
        result = invoke(*more)
        assert result.exit_code == 1 and message in " ".join(result.output.split())


def test_bases_are_sampled_with_prompts_or_without_a_condition(tmp_path):
    base, plain = build_diffusion_pipeline(), build_diffusion_pipeline(text=False)
    for pipe, settings, asked in (
        (base, {"prompts": ["a cat", "a fish"], "arguments": {"guidance_scale": 2.0}}, {"prompt": "a cat"}),
        (plain, {}, {}),
    ):
        folder = tmp_path / ("base" if settings else "plain")
        sample_images(pipe, SamplingConfig(3, batch_size=2, seed=5, **settings), folder, progress=False)
        generator = torch.Generator().manual_seed(7)
        alone = pipe(**asked, **settings.get("arguments", {}), generator=generator, output_type="pt").images[0]
        with Image.open(folder / "000002.png") as image:
            assert np.abs(np.array(image) / 255 - alone.permute(1, 2, 0).numpy()).max() < 0.51 / 255
    for pipe, settings, message in (
        (base, {}, "does not take classes; give it prompts"),
        (plain, {"prompts": ["a cat"]}, "reads no text; leave the prompts out"),
        (build_diffusion_pipeline(upsamples=True), {"prompts": ["a cat"]}, "enlarges images; measure it with"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_images(pipe, SamplingConfig(3, **settings), tmp_path / "new", progress=False)


def test_the_distance_of_a_cascade(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "cached_assets_path", lambda *_, **__: tmp_path)
    write_images(tmp_path / "reference.npz", some_images(6), 6)
    for kind in ("text", "class", "ddpm"):
        build_cascade(kind).save_pretrained(tmp_path / kind)
    settings = {"count": 4, "batch_size": 2, "arguments": {"aug_level": 0.3, "upsampler_num_inference_steps": 2}}

    def run(kind, **more):
        config = EvaluationConfig([str(tmp_path / kind)], str(tmp_path / "reference.npz"), str(tmp_path), **more)
        return evaluate(config, Thumbnails(), progress=False)[0]

    drawn = run("text", prompts=["a cat", "a fish"], **settings)
    assert drawn["metrics"]["fid"] > 0 and drawn["image_size"] == [16, 16]
    assert drawn["sampling"]["aug_level"] == 0.3 and drawn["sampling"]["top_k"] is not None
    cascade, asked = build_cascade(), settings["arguments"]
    expected = cascade("a fish", generator=torch.Generator().manual_seed(1), **asked).images[0]
    with Image.open(drawn["samples"] / "000001.png") as image:
        assert np.abs(np.array(image).astype(int) - np.asarray(expected)).max() <= 1
    assert run("class", classes="balanced", **settings)["sampling"]["conditions"] == "balanced classes"
    alone = {"num_inference_steps": 3, "upsampler_num_inference_steps": 2}
    assert run("ddpm", count=4, arguments=alone)["sampling"]["conditions"] == "none"
    with pytest.raises(ValueError, match="nonsense"):
        run("text", prompts=["a cat"], count=2, arguments={"nonsense": 1}, overwrite=True)
