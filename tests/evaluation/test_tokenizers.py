"""Tokenizers of several libraries, measured alike."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from PIL import Image
from tiny import build_class_pipeline, build_vq_model
from tiny_autoencoders import KINDS, build_autoencoder, build_janus_model
from torch import nn
from typer.testing import CliRunner


pytest.importorskip("datasets", reason="the training extra is not installed")

import llamagen_cli  # noqa: E402
from llamagen_hf import autoencoders  # noqa: E402
from llamagen_hf.autoencoders import describe_autoencoder, load_autoencoder, reconstruct  # noqa: E402
from llamagen_hf.evaluation import frechet_distance  # noqa: E402
from llamagen_hf.evaluation.images import open_images  # noqa: E402
from llamagen_hf.evaluation.inception import ImageFeatures  # noqa: E402
from llamagen_hf.evaluation.reconstruction import PerceptualLoss, psnr, ssim  # noqa: E402
from llamagen_hf.evaluation.tokenizers import compare_tokenizers, evaluate_tokenizer  # noqa: E402
from llamagen_hf.llamagen.training.vq_trainer import evaluate_tokenizer as evaluate_in_training  # noqa: E402


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(autoencoders, "PROBE_SIZE", 32)


def random_images(count: int = 5, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def evaluate(autoencoder, images=None, **kwargs):
    images = random_images() if images is None else images
    return evaluate_tokenizer(autoencoder, images, progress=False, **kwargs)


class QuarterMeans:
    """Mean colours of the four quarters of an image."""

    fingerprint = "quarters"

    def __call__(self, images: np.ndarray) -> ImageFeatures:
        assert images.dtype == np.uint8 and images.shape[3] == 3
        return ImageFeatures(nn.functional.adaptive_avg_pool2d(to_pixels(images), 2).flatten(1))


def black_out(autoencoder: nn.Module) -> nn.Module:
    """TAESD's decoder makes black images with weights of 0, a perfect copy of what is black."""
    for parameter in autoencoder.parameters():
        nn.init.zeros_(parameter)
    return autoencoder


@torch.no_grad()
def forward(kind: str, autoencoder: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """What the library's own forward gives, without noise."""
    if kind == "janus":
        return autoencoder(pixels).decoded_pixel_values
    if kind == "rae":
        return autoencoder((pixels + 1) / 2).sample * 2 - 1
    if kind == "tiny":  # its forward rounds latents to 8 bits
        return autoencoder.decode(autoencoder.encode(pixels).latents).sample
    if kind == "qwen-image":
        return autoencoder(pixels.unsqueeze(2), sample_posterior=False).sample.squeeze(2)
    return autoencoder(pixels).sample


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_and_facts_of_every_kind(kind):
    autoencoder, pixels = build_autoencoder(kind), to_pixels(random_images())
    _, factor, channels, codes = KINDS[kind]
    result = reconstruct(autoencoder, pixels)
    assert result.pixels.std() > 0
    torch.testing.assert_close(result.pixels, forward(kind, autoencoder, pixels))
    assert result.latents.shape == (5, channels, 32 // factor, 32 // factor)
    assert (result.codes is None) == (codes is None)
    facts = describe_autoencoder(autoencoder)
    assert facts[:3] == (factor, channels, codes)
    assert facts.parameters == sum(parameter.numel() for parameter in autoencoder.parameters())


def test_codes_are_those_that_are_decoded():
    pixels = to_pixels(random_images())
    llamagen, vq, janus = (build_autoencoder(kind) for kind in ("llamagen", "vq", "janus"))
    with torch.no_grad():
        result = reconstruct(llamagen, pixels)
        torch.testing.assert_close(llamagen.decode_codes(result.codes), result.pixels)
        result = reconstruct(vq, pixels)
        entries = vq.quantize.get_codebook_entry(result.codes.flatten(), (5, 16, 16, 3))
        torch.testing.assert_close(vq.decode(entries, force_not_quantize=True).sample, result.pixels)
        result = reconstruct(janus, pixels)
        torch.testing.assert_close(janus.decode(result.codes), result.pixels)
    assert all(len(reconstruct(model, pixels).codes.unique()) > 1 for model in (llamagen, vq, janus))


@pytest.mark.parametrize("kind", ["llamagen", "kl", "vq", "janus"])
def test_numbers_do_not_depend_on_the_batch_size(kind):
    autoencoder = build_autoencoder(kind)
    one, two, all_at_once = (evaluate(autoencoder, batch_size=n, extractor=QuarterMeans()) for n in (1, 2, 64))
    metrics = {"rfid", "psnr", "ssim"} | ({"codebook_usage", "codebook_perplexity"} if KINDS[kind][3] else set())
    assert metrics == {key for key, value in one.items() if isinstance(value, float)}
    for other in (one, two):
        assert [other[key] for key in metrics] == pytest.approx([all_at_once[key] for key in metrics], rel=1e-4)


def test_numbers_are_means_over_images_and_equal_those_of_the_training():
    autoencoder, pixels = build_autoencoder("llamagen"), to_pixels(random_images())
    found = evaluate(autoencoder, batch_size=2)
    expected = evaluate_in_training(autoencoder, [{"images": part} for part in pixels.split(2)])
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    with torch.no_grad():
        sample, codes = autoencoder(pixels).sample.clamp(-1, 1), autoencoder.encode(pixels).codes
    pair = (sample + 1) / 2, (pixels + 1) / 2
    assert found["psnr"] == pytest.approx(psnr(*pair).mean().item())
    # Near 0, a difference of numbers near 1, whose last bits depend on the size of the batch on some CPUs.
    assert found["ssim"] == pytest.approx(ssim(*pair).mean().item(), abs=1e-6)
    assert found["codebook_usage"] == len(codes.unique()) / 64 > 1 / 64


def test_rfid_and_lpips():
    autoencoder, extractor, perceptual_loss = build_autoencoder("kl"), QuarterMeans(), PerceptualLoss()
    found = evaluate(autoencoder, extractor=extractor, perceptual_loss=perceptual_loss, batch_size=2)
    sample = reconstruct(autoencoder, to_pixels(random_images())).pixels.clamp(-1, 1)
    rounded = ((sample + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    expected = frechet_distance(extractor(random_images()).pool, extractor(rounded).pool)
    assert found["rfid"] == pytest.approx(expected, rel=1e-6) and expected > 0
    assert found["lpips"] == pytest.approx(perceptual_loss(sample, to_pixels(random_images())).mean().item(), rel=1e-5)


def test_the_mean_of_a_posterior_is_decoded():
    autoencoder = build_autoencoder("kl")
    nn.init.constant_(autoencoder.quant_conv.bias[3:].data, 3.0)  # a wide posterior
    pixels = to_pixels(random_images())
    with torch.no_grad():
        mean = autoencoder.encode(pixels).latent_dist.mean
        assert not torch.equal(autoencoder.encode(pixels).latent_dist.sample(), mean)
        expected = autoencoder.decode(mean).sample
    for _ in range(2):
        result = reconstruct(autoencoder, pixels)
        assert torch.equal(result.latents, mean)
        torch.testing.assert_close(result.pixels, expected)


def test_a_perfect_tokenizer():
    autoencoder = black_out(build_autoencoder("tiny"))
    black = np.zeros_like(random_images())
    found = evaluate(autoencoder, black, extractor=QuarterMeans(), name="copy")
    assert found["psnr"] == math.inf and found["ssim"] == pytest.approx(1) and found["rfid"] == 0
    assert "| inf | 1.000 |" in compare_tokenizers([found])


def test_a_collapsed_codebook():
    found = evaluate(black_out(build_autoencoder("vq")))
    assert found["codebook_usage"] == 1 / 32 and found["codebook_perplexity"] == pytest.approx(1)


def test_count_takes_the_first_images():
    autoencoder = build_autoencoder("kl")
    assert evaluate(autoencoder, count=3, batch_size=2) == evaluate(autoencoder, random_images()[:3], batch_size=2)
    with pytest.raises(ValueError, match="`count` is 6; 'array' has 5 images"):
        evaluate(autoencoder, count=6)


def test_half_precision_runs_in_its_own_dtype():
    found = evaluate(build_autoencoder("kl").to(torch.bfloat16))
    assert found["psnr"] == pytest.approx(evaluate(build_autoencoder("kl"))["psnr"], abs=0.1)


@pytest.mark.parametrize("kind", ["llamagen", "kl", "vq", "dc"])
def test_sizes_must_be_multiples_of_the_factor(kind):
    with pytest.raises(ValueError, match="images are 33 x 33 pixels; for x both sides must be multiples of 2"):
        evaluate(build_autoencoder(kind), random_images(size=33), name="x")


@pytest.mark.parametrize("kind", ["janus", "rae"])
def test_tokenizers_of_one_size(kind):
    with pytest.raises(ValueError, match="images are 64 x 64 pixels; .* takes 32 x 32 only"):
        evaluate(build_autoencoder(kind), random_images(size=64))


def test_autoencoders_that_are_refused():
    grey = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2)
    with pytest.raises(ValueError, match="AutoencoderKL does not take RGB images"):
        evaluate(grey)
    one_way = AutoencoderKL(in_channels=3, out_channels=1, block_out_channels=(4,), norm_num_groups=2)
    with pytest.raises(ValueError, match=r"AutoencoderKL turns images \(1, 3, 32, 32\) into \(1, 1, 32, 32\)"):
        evaluate(one_way)
    broken = build_autoencoder("kl")
    nn.init.constant_(broken.decoder.conv_out.bias, torch.nan)
    with pytest.raises(ValueError, match="x gives NaN or infinity in torch.float32"):
        evaluate(broken, name="x")


@pytest.mark.parametrize("kind", KINDS)
def test_saved_equals_loaded(kind, tmp_path):
    autoencoder = build_autoencoder(kind)
    autoencoder.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is type(autoencoder) and not loaded.training and loaded.dtype == torch.float32
    pixels = to_pixels(random_images())
    assert torch.equal(reconstruct(loaded, pixels).pixels, reconstruct(autoencoder, pixels).pixels)


def build_latent_diffusion() -> LDMPipeline:
    unet = UNet2DModel(
        sample_size=16, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,),
        layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return LDMPipeline(build_autoencoder("vq"), unet, DDIMScheduler())


def test_a_whole_pipeline_gives_its_autoencoder(tmp_path):
    pixels = to_pixels(random_images())
    diffusion, ours, janus = build_latent_diffusion(), build_class_pipeline(), build_janus_model()
    for name, whole, part in (
        ("ldm", diffusion, diffusion.vqvae), ("ours", ours, ours.vq_model), ("janus", janus, janus.model.vqmodel)
    ):  # fmt: skip
        whole.save_pretrained(tmp_path / name)
        loaded = load_autoencoder(tmp_path / name)
        assert type(loaded) is type(part)
        assert torch.equal(reconstruct(loaded, pixels).pixels, reconstruct(part.eval(), pixels).pixels)
    assert type(load_autoencoder(tmp_path / "ldm", subfolder="vqvae")).__name__ == "VQModel"
    assert type(load_autoencoder("emoji")).__name__ == "LlamaGenVQModel"


def test_errors_of_loading(tmp_path):
    build_latent_diffusion().save_pretrained(tmp_path / "ldm")
    index = tmp_path / "ldm" / "model_index.json"
    with pytest.raises(OSError, match="holds UNet2DModel, not an autoencoder"):
        load_autoencoder(tmp_path / "ldm", subfolder="unet")
    index.write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(OSError, match="has no component vq_model, vqvae, vae or movq"):
        load_autoencoder(tmp_path / "ldm")
    for name in (tmp_path, "no/such-model", "./no/such/folder"):
        with pytest.raises(OSError, match="There is no autoencoder"):
            load_autoencoder(name)
    for kind in ("kl", "llamagen", "janus"):
        folder = tmp_path / kind
        autoencoder = build_autoencoder(kind)
        autoencoder.save_pretrained(folder)
        (weights,) = folder.glob("*.safetensors")
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(OSError, match="The weights of .* can't be loaded") as error:
            load_autoencoder(folder)
        assert "\n" not in str(error.value)
        state = {key: value for key, value in autoencoder.state_dict().items() if key != "decoder.conv_in.weight"}
        autoencoder.save_pretrained(folder, **({"state_dict": state} if kind == "janus" else {}))
        if kind != "janus":
            from safetensors.torch import save_file

            save_file(state, weights)
        with pytest.raises(OSError, match="lack 1 parameters, such as decoder.conv_in.weight"):
            load_autoencoder(folder)


FROM_HUB = """
import os, sys
from pathlib import Path
from fake_hub import fake_hub

def files(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

with fake_hub() as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from llamagen_hf.autoencoders import load_autoencoder

    names = []
    for folder in sys.argv[1:]:
        names.append("user/" + Path(folder).name)
        hub.repos[names[-1]] = [files(folder)]
    print(*(type(load_autoencoder(name)).__name__ for name in names))
    try:
        load_autoencoder("user/absent")
    except OSError as error:
        print(error)
    print(*(path for path in hub.requests if "unet" in path))
print(*(type(load_autoencoder(name)).__name__ for name in names))
"""


@pytest.mark.slow
def test_from_the_hub_and_from_its_cache(tmp_path):
    build_latent_diffusion().save_pretrained(tmp_path / "ldm")
    build_autoencoder("kl").save_pretrained(tmp_path / "kl")
    build_autoencoder("janus").save_pretrained(tmp_path / "janus")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    folders = [str(tmp_path / name) for name in ("ldm", "kl", "janus")]
    result = subprocess.run([sys.executable, "-c", FROM_HUB, *folders], env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    online, absent, requests, offline = result.stdout.splitlines()
    assert online == offline == "VQModel AutoencoderKL JanusVQVAE"
    assert absent.startswith("There is no autoencoder 'user/absent'") and requests == ""


def test_the_table():
    results = [evaluate(build_autoencoder(kind), name=kind) for kind in ("llamagen", "kl")]
    results[0] |= {"rfid": 2.194, "lpips": 0.1234, "parameters": 71_900_000, "codes": 16384}
    results[0] |= {"psnr": 20.791, "ssim": 0.6749, "codebook_usage": 0.97, "codebook_perplexity": 9876.5}
    results[0]["name"] = "a|b"
    head, line, first, second = compare_tokenizers(results).splitlines()
    assert head == (
        "| tokenizer | factor | codes or channels | parameters | rFID | PSNR | SSIM | LPIPS | usage | perplexity |"
    )
    assert first == "| a\\|b | 2 | 16,384 codes | 71.9M | 2.19 | 20.79 | 0.675 | 0.123 | 97.0% | 9,876 |"
    assert second.startswith("| kl | 2 | 3 channels | 0.0M | – | ") and second.endswith(" | – | – | – |")
    assert head.count("|") == line.count("|") == second.count("|")
    results[1]["images"] = 4
    with pytest.raises(ValueError, match=r"these are on \[5, 4\] images"):
        compare_tokenizers(results)


def invoke(*arguments):
    return CliRunner().invoke(llamagen_cli.app, ["compare-tokenizers", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    (path / "images").mkdir()
    for i, image in enumerate(random_images(4, 40)):
        Image.fromarray(image).save(path / "images" / f"{i}.png")
    build_autoencoder("kl").save_pretrained(path / "kl")
    build_vq_model().save_pretrained(path / "ours")
    black_out(build_autoencoder("tiny")).save_pretrained(path / "black")
    return path


def test_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    result = invoke("images", "kl", "ours", "--image-size", 32, "--count", 3, "--output", tmp_path / "a.md")
    assert result.exit_code == 0, result.output
    table = (tmp_path / "a.md").read_text()
    assert table.strip() in result.stdout and "| kl | 2 | 3 channels |" in table and "| ours | 2 | 64 codes |" in table
    result = invoke("images", "kl", "ours", "--image-size", 32, "--count", 3, "--output", tmp_path / "a.json")
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["images"] == "images" and [row["name"] for row in facts["tokenizers"]] == ["kl", "ours"]
    expected = evaluate(load_autoencoder("kl"), open_images("images", 32), count=3, name="kl")
    assert facts["tokenizers"][0] == expected
    assert not list(tmp_path.glob(".*"))


def test_infinity_is_plain_json(folder, tmp_path, monkeypatch):
    np.savez(tmp_path / "black.npz", np.zeros((2, 32, 32, 3), dtype=np.uint8))
    result = invoke(tmp_path / "black.npz", folder / "black", "--output", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "a.json").read_text()
    assert "Infinity" not in text and json.loads(text)["tokenizers"][0]["psnr"] == "inf"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["images", "kl", "--image-size", 33], "for kl both sides must be multiples of 2"),
        (["images", "absent"], "There is no autoencoder 'absent'"),
        (["absent", "kl"], "'absent' can't be read"),
        (["images", "kl", "--output", "a.txt"], "must end in .md or .json"),
        (["images", "kl", "--output", "absent/a.md"], "can't be written"),
        (["images", "kl", "--count", 5], "`count` is 5; 'images' has 4 images"),
        (["images", "kl", "--device", "nonsense"], "There is no device 'nonsense' here"),
        (["images", "kl", "--lpips", "--vgg16", "absent"], "There is no VGG16 at 'absent'"),
    ],
)
def test_errors_of_the_command(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert sorted(folder.rglob("*")) == before
