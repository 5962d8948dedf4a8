"""Models and images that several stages of the preparation are tested with."""

import math

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    from tiny_stages import build_clip, build_llava

    folder = tmp_path_factory.mktemp("models")
    for name, (model, processor) in (("llava", build_llava()), ("clip", build_clip())):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    torch.manual_seed(1)
    head = {"weight": torch.randn(1, 12), "bias": torch.randn(1)}
    save_file(head, folder / "head.safetensors")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Eleven rows; of the images, number 4 is damaged, 7 is cut off and 9 is missing."""
    datasets = pytest.importorskip("datasets", reason="the training extra is not installed")
    from tiny_stages import image_bytes

    content = [image_bytes(i) for i in range(11)]
    content[4], content[7], content[9] = b"no image", content[7][:-200], None
    rows = {
        "image": [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(content)],
        "caption": [f"w{i} w{i * i % 54} w{7 * i % 54}" + " w3" * i for i in range(11)],
        "similarity": [0.25, None, math.nan, 0.3, None, 0.1, None, 0.2, None, None, None],
        "aesthetic": [None, 5.5, None, None, None, 6.5, math.nan, 4.0, None, 3.0, None],
    }
    rows["caption"][8] = None
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.Value("string"),
        similarity=datasets.Value("float64"),
        aesthetic=datasets.Value("float32"),
    )
    folder = tmp_path_factory.mktemp("images")
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "rows.parquet")
    return content, rows, str(folder)
