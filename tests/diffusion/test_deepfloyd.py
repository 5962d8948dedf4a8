"""DeepFloyd IF's own folders draw here what they draw with diffusers' pipelines."""

import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny import build_class_pipeline, generators
from tiny_diffusion import build_if_pipeline

from llamagen_hf import PixelDiffusionPipeline


PROMPTS = ["A red Apple, 12:34", "hi"]


@pytest.mark.parametrize("solver", [False, True])
@pytest.mark.parametrize("upsamples", [False, True])
def test_deepfloyds_folders_load_and_draw_the_same(tmp_path, monkeypatch, upsamples, solver):
    # On a CPU ours computes in another format of memory, which rounds otherwise.
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)
    theirs = build_if_pipeline(upsamples)
    if solver:
        theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.save_pretrained(tmp_path)
    ours = PixelDiffusionPipeline.from_pretrained(tmp_path)
    ours.set_progress_bar_config(disable=True)
    assert ours.upsamples == upsamples and ours.image_size == 8
    small = torch.rand(2, 3, 4, 4)
    call = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pt"}
    expected = theirs(
        **call, generator=generators(0, 1), **{"image": 2 * small - 1, "noise_level": 300} if upsamples else {}
    ).images
    given = {"image": small, "aug_level": 0.3} if upsamples else {}
    output = ours(**call, generator=generators(0, 1), **given)
    assert torch.equal(output.images, (expected * 0.5 + 0.5).clamp(0, 1))
    assert not torch.allclose(output.images, ours(**call, generator=generators(2, 3), **given).images, atol=0.05)

    settings = {"num_inference_steps": 50, "guidance_scale": 4.0, "aug_level": 0.25}
    settings = settings if upsamples else {"num_inference_steps": 100, "guidance_scale": 7.0}
    assert ours.sampling_settings() == settings
    ours.save_pretrained(tmp_path / "ours")
    again = PixelDiffusionPipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**call, generator=generators(0, 1), **given).images, output.images)
    assert json.loads((tmp_path / "ours/model_index.json").read_text())["convention"] == "deepfloyd"


def test_another_pipeline_is_refused(tmp_path):
    build_class_pipeline().save_pretrained(tmp_path / "codes")
    with pytest.raises(OSError, match="'codes' holds another pipeline, of class 'AutoregressiveImagePipeline'"):
        PixelDiffusionPipeline.from_pretrained(tmp_path / "codes")
