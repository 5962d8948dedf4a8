"""PNG files that hold the parameters of their images."""

import os

import pytest
from PIL import Image

from llamagen_hf.provenance import in_common, read_parameters, save_png


def test_permissions_follow_the_umask_and_nothing_else_is_left(tmp_path):
    before = os.umask(0o027)
    try:
        save_png(Image.new("RGB", (4, 4)), tmp_path / "image.png", {"prompt": "äpple"})
    finally:
        os.umask(before)
    assert (tmp_path / "image.png").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
    assert read_parameters(tmp_path / "image.png") == {"prompt": "äpple"}


@pytest.mark.parametrize("name", ["absent/image.png", "folder", "file.txt/image.png"])
def test_an_image_that_cant_be_written_is_a_sentence(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError, match="^The image .* can't be written: [^:]*[.]$"):
        save_png(Image.new("RGB", (4, 4)), tmp_path / name, {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file.txt", "folder"]


def test_an_image_that_fails_halfway_leaves_the_old_file(tmp_path):
    save_png(Image.new("RGB", (4, 4), "red"), tmp_path / "image.png", {"seed": 1})
    with pytest.raises(TypeError):
        save_png(Image.new("RGB", (4, 4), "blue"), tmp_path / "image.png", {"seed": object()})
    assert read_parameters(tmp_path / "image.png") == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]


def test_parameters_in_common():
    one, two = {"prompt": "cat", "seed": 1, "top_k": 5}, {"prompt": "cat", "seed": 2, "top_k": 6}
    assert in_common([one, two]) == {"prompt": "cat", "seeds": [1, 2]}
    assert in_common([one]) == one
