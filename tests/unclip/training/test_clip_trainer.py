"""CLIP training: its loss, what it saves, what it starts from, and captions that are too long."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_clip import clip_config
from tiny_training import draw_shape, write_shapes
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionModelWithProjection


pytest.importorskip("datasets", reason="the training extra is not installed")

from llamagen_hf.clip import CLIPScorer, embed_images, embed_texts, load_clip  # noqa: E402
from llamagen_hf.images.transforms import center_crop, to_tensor  # noqa: E402
from llamagen_hf.training.record import read_facts  # noqa: E402
from llamagen_hf.training.trainer import Trainer  # noqa: E402
from llamagen_hf.unclip.training.clip_loss import CLIPEmbedder, contrastive_loss  # noqa: E402
from llamagen_hf.unclip.training.clip_models import train_clip_tokenizer  # noqa: E402
from llamagen_hf.unclip.training.clip_trainer import CLIPTask, train_clip  # noqa: E402


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    data = write_shapes(folder / "shapes")
    return folder, data, train_clip(data, clip_config(folder / "clip"))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_the_result_is_a_clip_like_any_other(shapes):
    folder, _, metrics = shapes
    assert metrics.keys() == {"test_loss", "test_image_to_text_r1", "test_text_to_image_r1", "test_r_precision"}
    assert read_facts(folder / "clip")["clip"]["metrics"] == metrics
    model, processor = load_clip(folder / "clip")
    assert type(model) is CLIPModel and type(processor) is CLIPProcessor
    assert type(processor.tokenizer) is CLIPTokenizer
    assert CLIPVisionModelWithProjection.from_pretrained(folder / "clip").config.projection_dim == 8
    scores = CLIPScorer.from_pretrained(folder / "clip", "{}")([draw_shape(0), draw_shape(1)], ["a red circle"] * 2)
    assert len(scores) == 2 and scores[0] != scores[1]
    assert [path.name for path in (folder / "clip" / "samples").iterdir()] == ["step-00000006.png"]
    assert Image.open(folder / "clip" / "samples" / "step-00000006.png").size == (8 * 16, 4 * 16)


@torch.no_grad()
def test_training_and_scoring_embed_alike(shapes):
    folder, data, _ = shapes
    task = set_up(data, clip_config(folder / "alike", init_from=str(folder / "clip")))
    image, caption = center_crop(draw_shape(2), 16), "a blue circle"
    ids = task.processor.tokenizer(caption).input_ids
    samples = [{"images": to_tensor(image), "input_ids": ids}, {"images": -to_tensor(image), "input_ids": ids[-3:]}]
    (image_embedding, _), (text_embedding, _) = task.embed(samples)  # in a batch with a shorter caption
    clip = load_clip(folder / "clip")
    torch.testing.assert_close(image_embedding, embed_images(*clip, [image])[0])
    torch.testing.assert_close(text_embedding, embed_texts(*clip, [caption])[0])


def set_up(data, config) -> CLIPTask:
    trainer = Trainer(config, CLIPTask(data, config))
    trainer.setup()
    return trainer.task


def test_the_loss_is_that_of_transformers(shapes):
    folder, _, _ = shapes
    model, _ = load_clip(folder / "clip")
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16), "input_ids": torch.randint(500, (3, 5))}
    inputs |= {"attention_mask": torch.ones(3, 5, dtype=torch.long)}
    embedded = CLIPEmbedder(model).eval()(**inputs)
    torch.testing.assert_close(contrastive_loss(*embedded), model(**inputs, return_loss=True).loss)


def test_micro_batches_compare_the_rows_of_the_whole_step(shapes, tmp_path):
    folder, data, _ = shapes
    config = {"batch_size": 8, "max_train_steps": 3, "init_from": str(folder / "clip")}
    losses = []
    for name, size in (("whole", None), ("parts", 2)):
        config |= {"micro_batch_size": size, "log_steps": 1}
        train_clip(data, clip_config(tmp_path / name, **config))
        records = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    for name, value in whole.items():
        if not name.endswith("k_proj.bias"):  # a softmax takes these out; Adam makes steps of rounding errors
            torch.testing.assert_close(value, parts[name], rtol=0, atol=1e-5, msg=name)


def test_it_learns_which_caption_belongs_to_an_image(shapes, tmp_path):
    _, data, before = shapes
    config = clip_config(
        tmp_path, caption_templates={"{caption}": 1.0}, max_train_steps=40, batch_size=8, learning_rate=1e-2,
        ema_decay=0.8, checkpointing_steps=99, eval_steps=99,
    )  # fmt: skip
    metrics = train_clip(data, config)
    assert metrics["test_image_to_text_r1"] == metrics["test_text_to_image_r1"] == metrics["test_r_precision"] == 1
    assert metrics["test_loss"] < before["test_loss"]


def test_the_temperature_stays_in_its_limit(shapes, tmp_path):
    folder, data, _ = shapes
    model, processor = load_clip(folder / "clip")
    model.logit_scale.data.fill_(math.log(100) + 1)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "start")
    settings = {"init_from": str(tmp_path / "start"), "max_train_steps": 1, "ema_decay": 0.0}
    train_clip(data, clip_config(tmp_path / "end", **settings))
    assert weights_of(tmp_path / "end")["logit_scale"].item() == pytest.approx(math.log(100))


def test_a_training_goes_on_from_a_clip(shapes, tmp_path):
    folder, data, _ = shapes
    start = str(folder / "clip")
    task = set_up(data, clip_config(tmp_path / "same", init_from=start, vision_width=32))
    assert all(torch.equal(value, task.clip.state_dict()[name]) for name, value in weights_of(folder / "clip").items())
    wrong = type(data)(**vars(data) | {"image_size": 32})
    with pytest.raises(ValueError, match="image_size is 32, but the CLIP of init_from takes images of 16 pixels"):
        train_clip(wrong, clip_config(tmp_path / "x", init_from=start))
    with pytest.raises(ValueError, match="init_from can't be loaded: There is no CLIP model"):
        train_clip(data, clip_config(tmp_path / "x", init_from=str(tmp_path)))
    with pytest.raises(ValueError, match=r"image_size is 16; expected a multiple of patch_size \(5\)"):
        train_clip(data, clip_config(tmp_path / "x", patch_size=5))
    assert not (tmp_path / "x").exists()


def test_captions_that_are_too_long_are_cut_on_request_only(shapes, tmp_path):
    _, data, _ = shapes
    settings = {"text_length": 4, "caption_templates": {"{caption}": 1.0}, "max_train_steps": 1}
    message = r"caption too long for CLIP: it has \d+ tokens, and 4 fit; set truncate_captions"
    with pytest.raises(ValueError, match=message):
        train_clip(data, clip_config(tmp_path / "whole", **settings))
    train_clip(data, clip_config(tmp_path / "cut", truncate_captions=True, **settings))
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "cut").tokenizer
    ids = tokenizer("a red circle", truncation=True).input_ids
    assert len(ids) == 4 and ids[-1] == tokenizer.eos_token_id


def test_the_tokenizer_reads_any_text(tmp_path):
    tokenizer = train_clip_tokenizer(["a red apple", "a red car"] * 3, 530, 32)
    assert len(tokenizer) <= 530 and tokenizer.eos_token_id == len(tokenizer) - 1
    assert len(tokenizer.tokenize("red")) == 1 and tokenizer.tokenize("RED") == tokenizer.tokenize("red")
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in ("", "straße 猫 42 %", "a red apple!"):
        ids = tokenizer(text).input_ids
        assert ids == again(text).input_ids and ids.count(tokenizer.unk_token_id) == 1  # the end mark
        assert again.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    with pytest.raises(ValueError, match="text_vocab_size is 513; a tokenizer of CLIP has at least 514 tokens"):
        train_clip_tokenizer(["a"], 513, 8)
