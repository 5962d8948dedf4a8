"""LPIPS by the formula of its paper, and as published."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_hub import fake_hub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from llamagen_hf.evaluation import reconstruction
from llamagen_hf.evaluation.reconstruction import PerceptualLoss


def vgg16_features() -> nn.Sequential:
    """The convolutions of VGG16 as torchvision orders them, with random weights that keep the scale of their input."""
    layers, channels = [], 3
    for width in (64, 64, "pool", 128, 128, "pool", *[256] * 3, "pool", *[512] * 3, "pool", *[512] * 3, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            std = math.sqrt(2 / (9 * channels))
            nn.init.normal_(layers[-2].weight, std=std)
            channels = width
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    """Random VGG16: its convolutions, and a file of them in timm's layout with a stand-in for the classifier."""
    torch.manual_seed(0)
    features = vgg16_features()
    folder = tmp_path_factory.mktemp("vgg16")
    weights = {f"features.{name}": value for name, value in features.state_dict().items()}
    save_file(weights | {"head.fc.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    return SimpleNamespace(features=features, folder=folder, file=folder / "model.safetensors")


@pytest.fixture(scope="module")
def perceptual_loss(vgg16):
    """LPIPS on the random VGG16, with random weights for the channels."""
    torch.manual_seed(1)
    model = PerceptualLoss()
    model.features.load_state_dict(vgg16.features.state_dict())
    for head in model.heads:
        head.weight.uniform_()
    return model


def lpips(images, targets, features, channel_weights):
    """Equation 1 of the paper, with ImageNet's normalisation of pixels in [0, 1]."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x, y = (((pixels + 1) / 2 - mean) / std for pixels in (images, targets))
    total, after_relu = 0, {"3": 0, "8": 1, "15": 2, "22": 3, "29": 4}  # relu1_2, 2_2, 3_3, 4_3 and 5_3
    for name, layer in features.named_children():
        x, y = layer(x), layer(y)
        if name in after_relu:
            difference = x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)
            weight = channel_weights[after_relu[name]].view(-1, 1, 1)
            total = total + (weight * difference**2).sum(1).mean((1, 2))
    return total


def random_images(count=2, size=32):
    return torch.rand(2, count, 3, size, size) * 2 - 1


def test_perceptual_loss_and_its_gradient_by_the_formula(perceptual_loss, vgg16):
    images, targets = random_images()
    images.requires_grad_()
    got = perceptual_loss(images, targets)
    expected = lpips(images, targets, vgg16.features, [head.weight.flatten() for head in perceptual_loss.heads])
    assert got.shape == (2,) and got.min() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    weights = torch.tensor([1.0, 2.0])
    (gradient,) = torch.autograd.grad((weights * got).sum(), images)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), images)
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


def test_equal_images_have_no_distance_and_the_batch_does_not_matter(perceptual_loss):
    images, targets = random_images(3, size=16)
    assert perceptual_loss(images, images).tolist() == [0, 0, 0]
    alone = torch.cat([perceptual_loss(*pair) for pair in zip(images.split(1), targets.split(1), strict=True)])
    torch.testing.assert_close(perceptual_loss(images, targets), alone)
    torch.testing.assert_close(perceptual_loss(targets, images), alone)


def test_perceptual_loss_never_trains_and_stays_in_float32(perceptual_loss):
    images, targets = random_images(size=16)
    expected = perceptual_loss(images, targets)
    assert not expected.requires_grad and not any(p.requires_grad for p in perceptual_loss.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(perceptual_loss.train()(images, targets), expected)
    for dtype in (torch.bfloat16, torch.float64):
        rounded = images.to(dtype)
        assert torch.equal(perceptual_loss(rounded, targets), perceptual_loss(rounded.float(), targets))


def test_new_perceptual_loss_is_twice_the_cosine_distance():
    model, (images, targets) = PerceptualLoss(), random_images(size=16)
    expected = lpips(images, targets, model.features, [torch.ones(width) for width in (64, 128, 256, 512, 512)])
    torch.testing.assert_close(model(images, targets), expected, rtol=1e-4, atol=1e-6)


def test_images_that_activate_no_feature():
    model = PerceptualLoss()
    for parameter in model.features.parameters():
        parameter.zero_()
    images, targets = random_images(size=16)
    images.requires_grad_()
    distances = model(images, targets)
    distances.sum().backward()
    assert distances.tolist() == [0, 0] and torch.equal(images.grad, torch.zeros_like(images))


@pytest.mark.parametrize("shapes", [[(2, 3, 16, 16), (1, 3, 16, 16)], [(2, 1, 16, 16)] * 2, [(2, 3, 15, 16)] * 2])
def test_images_that_cannot_be_compared(shapes):
    with pytest.raises(ValueError, match="twice the same .batch, 3, height, width., with sides of 16 or more"):
        PerceptualLoss()(*map(torch.zeros, shapes))


def test_loaded_perceptual_loss_equals_torchmetrics(vgg16, monkeypatch):
    torchmetrics_lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    # torchmetrics asks torchvision for its convolutions.
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: vgg16.features)
    images, targets = random_images()
    expected = torchmetrics_lpips.learned_perceptual_image_patch_similarity(images, targets, "vgg", reduction="none")
    for source in (vgg16.file, str(vgg16.folder)):
        loaded = PerceptualLoss.from_pretrained(source)
        assert not any(p.requires_grad for p in loaded.parameters())
        torch.testing.assert_close(loaded(images, targets), expected)
    assert expected.min() > 0.1


# The file alone: the rest of the package takes longer to import than the test takes.
FROM_THE_HUB = """
import runpy, sys

model = runpy.run_path(sys.argv[1])["PerceptualLoss"].from_pretrained()
print(model.features[28].weight.double().sum().item())
"""


@pytest.mark.slow
def test_default_weights_come_from_the_hub(vgg16, tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with fake_hub() as hub:
        hub.repos["timm/vgg16.tv_in1k"] = [{"model.safetensors": vgg16.file.read_bytes()}]
        env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, reconstruction.__file__],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    assert float(run.stdout) == vgg16.features[28].weight.double().sum().item()


def test_the_shipped_heads_are_those_of_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    path = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"
    expected = torch.load(path, map_location="cpu", weights_only=True)
    shipped = load_file(reconstruction.LPIPS_HEADS)
    assert len(shipped) == len(expected) == 5
    for i in range(5):
        assert torch.equal(shipped[f"heads.{i}.weight"], expected[f"lin{i}.model.1.weight"])
    assert "BSD-2-Clause" in safe_open(reconstruction.LPIPS_HEADS, framework="pt").metadata()["license"]
    assert "Richard Zhang" in reconstruction.LPIPS_HEADS.with_suffix(".LICENSE").read_text(encoding="utf-8")


def test_lpips_does_not_need_torchmetrics(vgg16, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    loaded = PerceptualLoss.from_pretrained(vgg16.file)
    images, targets = random_images()
    assert (loaded(images, targets) > 0).all() and loaded(images, images).tolist() == [0, 0]


def test_perceptual_weights_that_cannot_be_loaded(tmp_path):
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors does not hold VGG16, features.0.weight to features.28.b"):
        PerceptualLoss.from_pretrained(tmp_path / "other.safetensors")
    for absent in ("user/absent", tmp_path, "no file of that name"):
        with pytest.raises(OSError, match=f"There is no VGG16 at '{absent}': no file, and no folder or reachable Hub"):
            PerceptualLoss.from_pretrained(absent)
