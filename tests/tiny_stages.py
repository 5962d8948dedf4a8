"""Tiny models and tables for the stages of the preparation: a LLaVA, a CLIP, and rows with images."""

import io
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llamagen_hf.data.filtering import FilterConfig
from llamagen_hf.data.recaptioning import RecaptionConfig
from llamagen_hf.data.scoring import ScoreConfig


PREPARE = Path(__file__).parents[1] / "pipelines" / "prepare.py"
WORDS = ["<unk>", "<s>", "<pad>", "<image>", "USER:", "ASSISTANT:", "what", "is", "this"]
WORDS += [f"w{i}" for i in range(54)] + ["</s>"]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
GRIDS = [[16, 32], [32, 16], [32, 32]]


def build_tokenizer(closes_texts):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closes_texts else "<s> $A", special_tokens=[("<s>", 1), ("</s>", len(WORDS) - 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def build_llava(next_version=False):
    """A tiny LLaVA, or LLaVA-NeXT, which spends more tokens on larger images."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": len(WORDS) - 1,
        "pad_token_id": 2,
    }
    vision = {"model_type": "clip_vision_model", **VISION}
    shared = {"vision_config": vision, "text_config": text, "image_token_index": 3}
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    options = {
        "tokenizer": build_tokenizer(closes_texts=False),
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "chat_template": CHAT_TEMPLATE,
        "num_additional_image_tokens": 1,
    }
    if next_version:
        images = LlavaNextImageProcessor(image_grid_pinpoints=GRIDS, **sizes)
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(image_grid_pinpoints=GRIDS, **shared))
        return model.eval(), LlavaNextProcessor(image_processor=images, **options)
    model = LlavaForConditionalGeneration(LlavaConfig(**shared))
    return model.eval(), LlavaProcessor(image_processor=CLIPImageProcessor(**sizes), **options)


def build_clip():
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": len(WORDS) - 1,
        "pad_token_id": 2,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return model, CLIPProcessor(image_processor=images, tokenizer=build_tokenizer(closes_texts=True))


def image_bytes(i):
    """Noise of its own size for each number, as the bytes of a file."""
    pixels = np.random.default_rng(i).integers(0, 256, (16 + 9 * (i % 3), 16 + 7 * (i % 4), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def filter_config(table, folder, **kwargs):
    sizes = {"batch_size": 64, "rows_per_shard": 50}
    return FilterConfig(dataset=table[1], output_dir=str(folder), **sizes | kwargs)


def recaption_config(pictures, models_folder, folder, **kwargs):
    options = {"prompt": "what is this", "max_new_tokens": 6, "batch_size": 3, "rows_per_shard": 4} | kwargs
    return RecaptionConfig(dataset=pictures[2], output_dir=str(folder), model=str(models_folder / "llava"), **options)


def score_config(pictures, models_folder, folder, **kwargs):
    options = {
        "batch_size": 3,
        "rows_per_shard": 4,
        "aesthetic_head": str(models_folder / "head.safetensors"),
    } | kwargs
    return ScoreConfig(dataset=pictures[2], output_dir=str(folder), model=str(models_folder / "clip"), **options)


def read_undecoded(folder):
    rows = datasets.load_dataset("parquet", data_files=f"{folder}/train-*.parquet", split="train")
    assert rows.features["image"] == datasets.Image()
    return list(rows.cast_column("image", datasets.Image(decode=False)))


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("train-*.parquet"))}
