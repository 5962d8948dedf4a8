"""A cascade on the Hub: files at any depth, its card, and what comes back offline."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_cascade import build_cascade, build_nested_cascade

from llamagen_hf.data.fingerprint import fingerprint_pipeline
from llamagen_hf.publishing.cards import write_card
from llamagen_hf.publishing.publications import open_publication
from llamagen_hf.publishing.publish import generate_sheet, sheet_conditions


DRAW = """
import json, sys, torch
import llamagen_hf

pipe = llamagen_hf.CascadePipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
image = pipe("a red apple", generator=torch.Generator().manual_seed(3), output_type="pt").images
print(json.dumps(image.tolist()))
"""


def add_record(folder, section, dataset, metrics, **more):
    facts = {"data": {"dataset": dataset}, section: {"settings": {"steps": 2}, "metrics": metrics}} | more
    (folder / "training.json").write_text(json.dumps(facts))


def test_all_files_of_a_nested_cascade_are_found(tmp_path):
    build_nested_cascade().save_pretrained(tmp_path)
    (tmp_path / "base" / "checkpoints").mkdir()
    (tmp_path / "base" / "checkpoints" / "model.safetensors").write_bytes(b"")
    names = set(open_publication(tmp_path).files)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names == files - {"base/checkpoints/model.safetensors"}
    assert "base/base/vq_model/diffusion_pytorch_model.safetensors" in names
    for path in (tmp_path / "base" / "upsampler" / "unet").iterdir():
        path.unlink()
    (tmp_path / "base" / "upsampler" / "unet").rmdir()
    with pytest.raises(OSError, match="incomplete: there is no base/upsampler/unet"):
        open_publication(tmp_path)


def test_the_card_tells_of_both_parts(tmp_path):
    cascade = build_cascade()
    cascade.save_pretrained(tmp_path)
    add_record(tmp_path / "base", "generator", "user/emoji", {"test_loss": 3.5}, examples=["a blue disc"])
    add_record(tmp_path / "upsampler", "diffusion", "user/large", {"test_psnr": 24.0})
    publication = open_publication(tmp_path)
    conditions = sheet_conditions(publication, cascade)
    assert conditions == ["a blue disc"]
    card = write_card(publication, "user/cascade", cascade, conditions, None)
    for words in [
        "CascadePipeline.from_pretrained",
        'pipe("a blue disc")',
        "| image | 16 x 16 pixels |",
        "| reads | a prompt |",
        "| `upsampler_num_inference_steps` | 4 |",
        "| `aug_level` | 0.0 |",
        "| base.transformer |",
        "| upsampler.unet |",
        "| base: generator, loss in nats a code | 3.500 |",
        "| upsampler: reduced images enlarged, PSNR in dB | 24.00 |",
        "- base: The images of [user/emoji]",
        "- upsampler: The images of [user/large]",
    ]:
        assert words in card.text
    assert card.data.datasets == ["user/emoji", "user/large"] and "cascaded-diffusion" in card.data.tags
    datasets = {result.metric_type: result.dataset_name for result in card.data.eval_results}
    assert datasets == {"test_loss": "user/emoji", "test_psnr": "user/large"}
    assert generate_sheet(cascade, ["a", "b"], columns=2, side=16).size == (48, 60)


def test_the_fingerprint_names_the_part_that_changed():
    cascade = build_nested_cascade()
    before = fingerprint_pipeline(cascade)
    with torch.no_grad():
        next(cascade.base.upsampler.unet.parameters()).add_(1)
    cascade.base.base.register_to_config(sampling_defaults={"top_k": 3})
    now = fingerprint_pipeline(cascade)
    changed = {name for name in now if now[name] != before[name]}
    assert changed == {"the weights of base.upsampler.unet", "the settings of base.base"}


@pytest.mark.slow
def test_publish_and_load_offline(user, tmp_path):
    cascade = build_cascade()
    cascade.save_pretrained(tmp_path / "cascade")
    expected = cascade("a red apple", generator=torch.Generator().manual_seed(3), output_type="pt").images.tolist()
    user.publish(tmp_path / "cascade", "user/cascade")
    files = user.hub.repos["user/cascade"][-1]
    assert {"contact_sheet.png", "base/model_index.json", "upsampler/unet/config.json"} <= set(files)
    assert [name for name, content in files.items() if str(tmp_path).encode() in content] == []
    assert "CascadePipeline" in ModelCard(files["README.md"].decode()).text
    assert user.codes(DRAW, "user/cascade") == expected
    assert user.codes(DRAW, "user/cascade", HF_HUB_OFFLINE="1") == expected
    (tmp_path / "cascade" / "contact_sheet.png").write_bytes(files["contact_sheet.png"])
    user.publish(tmp_path / "cascade", "user/cascade")  # over its own earlier version
    assert len(user.hub.repos["user/cascade"]) == 2
