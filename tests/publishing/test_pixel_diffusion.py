"""Cards, sheets and publishing of pixel diffusion."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from tiny import build_class_pipeline
from tiny_diffusion import build_diffusion_pipeline

from llamagen_hf.families import find_family
from llamagen_hf.publishing.cards import write_card
from llamagen_hf.publishing.publications import Publication, open_publication
from llamagen_hf.publishing.publish import PROMPTS, generate_sheet, sheet_conditions


FAMILY = find_family("PixelDiffusionPipeline")
KINDS = {
    "base": {"text": True},
    "unconditional": {"text": False},
    "upsampler": {"text": True, "upsamples": True},
    "plain upsampler": {"text": False, "upsamples": True},
}
DRAW = """
import json, sys, torch
import llamagen_hf
from diffusers import DiffusionPipeline

cls = DiffusionPipeline if sys.argv[2] == "DiffusionPipeline" else llamagen_hf.PixelDiffusionPipeline
pipe = cls.from_pretrained(sys.argv[1])
assert type(pipe) is llamagen_hf.PixelDiffusionPipeline
pipe.set_progress_bar_config(disable=True)
image = pipe("a red apple", generator=torch.Generator().manual_seed(3), output_type="pt").images
print(json.dumps(image.tolist()))
"""


def card_of(folder, pipe, conditions=PROMPTS):
    pipe.save_pretrained(folder)
    return write_card(open_publication(folder), "user/pixels", pipe, conditions, None)


@pytest.mark.parametrize(
    "kind, task, tag, reads, call",
    [
        ("base", "text-to-image", "text-to-image", "a prompt", 'pipe("a red apple")'),
        ("unconditional", "unconditional-image-generation", "unconditional", "nothing but noise", "pipe()"),
        (
            "upsampler",
            "image-to-image",
            "super-resolution",
            "a prompt and an image of at most 16 x 16 pixels",
            'pipe("a red apple", image=load_image("small.png"))',
        ),
        (
            "plain upsampler",
            "image-to-image",
            "super-resolution",
            "an image of at most 16 x 16 pixels",
            'pipe(image=load_image("small.png"))',
        ),
    ],
)
def test_a_card_says_what_it_reads_and_how_it_draws(tmp_path, kind, task, tag, reads, call):
    pipe = build_diffusion_pipeline(**KINDS[kind])
    card = card_of(tmp_path, pipe)
    assert card.data.pipeline_tag == task and card.data.tags == ["imagen", "pixel-diffusion", tag]
    assert f"| reads | {reads} |" in card.text and f"image = {call}.images[0]" in card.text
    assert "| image | 16 x 16 pixels |" in card.text and "| `num_inference_steps` | 4 |" in card.text
    assert ("| `guidance_scale` | 4.0 |" in card.text) == KINDS[kind]["text"]
    assert ("| `aug_level` | 0.0 |" in card.text) == pipe.upsamples == ("load_image\n" in card.text)
    assert ("are made up" in card.text) == pipe.upsamples and "{{" not in card.text
    assert ("widget" in card.data.to_dict()) == (kind == "base")
    assert "2205.11487" in card.text and "saharia2022photorealistic" in card.text
    count = sum(p.numel() for p in pipe.unet.parameters())
    assert f"| unet | {count / 1e6:.1f}M |" in card.text


def test_a_card_of_llamagen_says_its_settings_too(tmp_path):
    pipe = build_class_pipeline()
    pipe.save_pretrained(tmp_path)
    card = write_card(open_publication(tmp_path), "user/fish", pipe, [0], None)
    assert "| reads | a class |" in card.text and f"| `top_k` | {pipe.sampling_settings()['top_k']} |" in card.text


METRICS = {
    "test_loss": 0.0512345,
    "test_loss_without_prompt": 0.06,
    "test_psnr": 24.1,
    "test_psnr_bicubic": 22.0,
    "test_redrawn_lpips": 0.2,
}


def test_a_card_has_what_the_training_measured(tmp_path):
    pipe = build_diffusion_pipeline(upsamples=True)
    settings = {"max_train_steps": 2, "init_from": "user/earlier"}
    facts = {"data": {"dataset": "user/shapes"}, "diffusion": {"settings": settings, "metrics": METRICS}}
    (tmp_path / "training.json").write_text(json.dumps(facts | {"examples": ["a blue disc"]}))
    card = card_of(tmp_path, pipe)
    for row in [
        "| loss | 0.0512 |",
        "| ... without its prompts | 0.0600 |",
        "| reduced images enlarged, PSNR in dB | 24.10 |\n| ... enlarged bicubically | 22.00 |",
        "| redrawn images enlarged, LPIPS | 0.200 |",
        '"max_train_steps": 2',
        "[user/shapes](https://huggingface.co/datasets/user/shapes)",
    ]:
        assert row in card.text
    assert {result.metric_type for result in card.data.eval_results} == set(METRICS)
    assert card.data.datasets == ["user/shapes"] and card.data.base_model == "user/earlier"
    assert sheet_conditions(open_publication(tmp_path), pipe) == ["a blue disc"]


def test_an_adapter_of_a_unet_is_known_by_its_record(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "training.json").write_text('{"diffusion": {}}')
    save_file({"weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    assert open_publication(tmp_path).family == FAMILY
    settings = {"low_image_size": 64, "conditioning": "none"}
    (tmp_path / "training.json").write_text(json.dumps({"diffusion": {"settings": settings}}))
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "base_model_name_or_path": "emoji_upsampler"}')
    card = write_card(open_publication(tmp_path), "user/sharper", None, PROMPTS, None)
    assert 'from_pretrained("emoji_upsampler")' in card.text and "load_image\n" in card.text
    assert 'pipe(image=load_image("small.png"))' in card.text and card.data.pipeline_tag == "image-to-image"
    (tmp_path / "training.json").write_text('{"generator": {}}')
    assert open_publication(tmp_path).family.name == "LlamaGen"


def test_sheets(tmp_path):
    publication = Publication(tmp_path, "pipeline", FAMILY)
    pipe = build_diffusion_pipeline(text=False)
    seeds = sheet_conditions(publication, pipe)
    assert seeds == list(range(12))
    sheet = generate_sheet(pipe, seeds[:3], columns=2, side=16)
    assert sheet.size == (2 * 24, 2 * 60)
    alone = pipe(generator=torch.Generator().manual_seed(2)).images[0]
    assert sheet.crop((4, 64, 20, 80)).tobytes() == alone.tobytes()
    assert generate_sheet(build_diffusion_pipeline(), ["a cat"], columns=1).size == (136, 172)
    assert generate_sheet(build_diffusion_pipeline(image_size=160, patch_size=4), ["a cat"], columns=1).size == (
        168,
        204,
    )


@pytest.mark.slow
def test_publish_and_load_offline(user, tmp_path):
    pipe = build_diffusion_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    user.publish(tmp_path / "pipe", "user/pixels")
    files = user.hub.repos["user/pixels"][-1]
    assert "contact_sheet.png" in files and "unet/diffusion_pytorch_model.safetensors" in files
    assert "pipe(" in ModelCard(files["README.md"].decode()).text
    expected = pipe("a red apple", generator=torch.Generator().manual_seed(3), output_type="pt").images.tolist()
    assert user.codes(DRAW, "user/pixels", "PixelDiffusionPipeline") == expected
    for name in ("PixelDiffusionPipeline", "DiffusionPipeline"):
        assert user.codes(DRAW, "user/pixels", name, HF_HUB_OFFLINE="1") == expected
    build_diffusion_pipeline(upsamples=True).save_pretrained(tmp_path / "upsampler")
    user.publish(tmp_path / "upsampler", "user/upsampler")
    assert "contact_sheet.png" not in user.hub.repos["user/upsampler"][-1]
    Image.new("RGB", (16, 16)).save(tmp_path / "upsampler" / "contact_sheet.png")
    user.publish(tmp_path / "upsampler", "user/upsampler")
    assert "contact_sheet.png" in user.hub.repos["user/upsampler"][-1]
