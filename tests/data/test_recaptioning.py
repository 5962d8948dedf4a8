"""Recaptioning with models of the real classes."""

import io

import pytest
import torch
from PIL import Image


datasets = pytest.importorskip("datasets", reason="the training extra is not installed")

from tiny_stages import (  # noqa: E402
    WORDS,
    build_llava,
    image_bytes,
    read_undecoded,
    recaption_config,
)

from llamagen_hf.data.recaptioning import caption_images, recaption  # noqa: E402


@pytest.mark.parametrize("next_version", [False, True])
def test_captions_do_not_depend_on_the_batch(next_version):
    model, processor = build_llava(next_version)
    images = [Image.open(io.BytesIO(image_bytes(i))) for i in range(5)]
    together = caption_images(model, processor, images, "what is this", 8)
    assert together == [caption_images(model, processor, [image], "what is this", 8)[0] for image in images]
    assert len(set(together)) > 2
    if next_version:  # otherwise nothing is padded, and the test proves little
        chats = [[{"role": "user", "content": [{"type": "image", "image": image}]}] for image in images]
        lengths = {
            len(processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]) for chat in chats
        }
        assert len(lengths) > 1


def test_recaptioning_keeps_the_rows_and_adds_long_captions(images, models_folder, tmp_path):
    content, rows, _ = images
    report = recaption(recaption_config(images, models_folder, tmp_path))
    assert report == {"shards": 3, "rows": 11, "captioned": 8, "undecodable": 3}
    found = read_undecoded(tmp_path)
    assert [row["caption"] for row in found] == rows["caption"]
    assert [row["image"] and row["image"]["bytes"] for row in found] == content
    model, processor = build_llava()
    for data, row in zip(content, found, strict=True):
        if data in (content[4], content[7], content[9]):
            assert row["long_caption"] is None
        else:
            image = Image.open(io.BytesIO(data))
            assert [row["long_caption"]] == caption_images(model, processor, [image], "what is this", 6)


def test_captions_are_the_words_a_greedy_search_finds():
    model, processor = build_llava()
    image = Image.open(io.BytesIO(image_bytes(0)))
    inputs = processor(images=image, text="USER: <image> what is this ASSISTANT:", return_tensors="pt")
    ids, words = inputs["input_ids"], []
    for _ in range(5):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        words.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[words[-1]]])], dim=1)
    assert len(WORDS) - 1 not in words
    expected = " ".join(WORDS[i] for i in words if i not in (1, 2, 3))
    assert caption_images(model, processor, [image], "what is this", 5) == [expected]
