"""A folder of tiny images with captions."""

import json

from PIL import Image


def paint(path, shade):
    Image.new("RGB", (16, 16), (shade, 255 - shade, 0)).save(path)


def write_images(folder):
    """Six images with captions, and what no reader takes for a part of them."""
    folder.mkdir()
    for index in range(6):
        paint(folder / f"{index}.png", 40 * index)
    write_captions(folder, "a shade")
    (folder / "README.md").write_text("mine")
    return folder


def write_captions(folder, caption):
    lines = [json.dumps({"file_name": f"{index}.png", "caption": f"{caption} {index}"}) for index in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
