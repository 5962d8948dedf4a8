"""The checkpoints that ship with the package, by their names: emoji, and its upsampler if there is one."""

import pytest
from tiny import build_text_pipeline
from tiny_diffusion import build_diffusion_pipeline

from llamagen_hf import AutoregressiveImagePipeline, PixelDiffusionPipeline
from llamagen_hf.families import load_pipeline
from llamagen_hf.loading import checkpoint
from llamagen_hf.loading.checkpoint import find_upsampler, is_shipped, shipped_folder


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder that stands for that of the package, with a base alone."""
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    build_text_pipeline().save_pretrained(tmp_path / "emoji")
    return tmp_path


def test_the_upsampler_is_known_by_its_name(shipped, tmp_path, monkeypatch):
    assert not is_shipped("emoji_upsampler") and shipped_folder("emoji_upsampler") is None
    build_diffusion_pipeline(text=False, upsamples=True).save_pretrained(shipped / "emoji_upsampler")
    assert is_shipped("emoji_upsampler") and shipped_folder(None) == shipped_folder("emoji") == shipped / "emoji"
    for name in ("emoji_upsampler", shipped / "emoji_upsampler"):
        pipe = load_pipeline(name)
        assert pipe.upsamples and pipe.facts["checkpoint"] == "emoji_upsampler" and pipe.name_or_path is None
    assert AutoregressiveImagePipeline.from_pretrained().facts["checkpoint"] == "emoji"
    # A folder of that name is another one.
    monkeypatch.chdir(tmp_path)
    build_diffusion_pipeline(text=False, upsamples=True, image_size=32).save_pretrained("emoji_upsampler/own")
    own = PixelDiffusionPipeline.from_pretrained("./emoji_upsampler/own")
    assert own.image_size == 32 and own.facts["checkpoint"] == "./emoji_upsampler/own"


def test_the_upsampler_comes_with_the_emoji_checkpoint_alone(shipped):
    assert find_upsampler(None) is None and find_upsampler("emoji", "user/own") == "user/own"
    (shipped / "emoji_upsampler").mkdir()
    assert find_upsampler(None) == find_upsampler("emoji") == "emoji_upsampler"
    assert find_upsampler("./emoji") is None and find_upsampler("user/model") is None
    assert find_upsampler(None, "none") is None and find_upsampler("user/model", "none") is None
    assert find_upsampler(None, "user/own") == find_upsampler("user/model", "user/own") == "user/own"
