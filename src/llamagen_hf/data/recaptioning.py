"""Recaptioning: long captions of images by a vision-language model.

LlamaGen (arXiv 2406.06525) trains its second text-conditional stage on 10M images with long captions by LLaVA.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from datasets import Value
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..processes import on_main_process, this_process
from .shards import StageConfig, add_columns, decode_batches, fingerprint_inputs, open_folder, open_rows


@dataclass
class RecaptionConfig(StageConfig):
    """One run of [`recaption`]: the recipe's section `recaption`, beside the settings of [`StageConfig`]."""

    model: str = field(
        default="llava-hf/llava-1.5-7b-hf",
        metadata={"help": "Folder or Hub id of an image-text-to-text model with a chat template."},
    )
    prompt: str = field(
        default="Describe this image in as much detail as possible.", metadata={"help": "What to ask of each image."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    long_caption_column: str = field(default="long_caption", metadata={"help": "New column for the long captions."})
    max_new_tokens: int = field(default=256, metadata={"help": "Highest number of tokens in a caption."})
    batch_size: int = field(default=16, metadata={"help": "Images captioned at a time."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "What the model runs in; auto: the checkpoint's own."}
    )
    device_map: str | None = field(
        default=None, metadata={"help": "auto spreads one model over all devices; unset: one model for each process."}
    )


def recaption(config: RecaptionConfig) -> dict:
    """Add long captions to a dataset of images; all its columns, such as short captions, stay.

    Captions are decoded greedily. An image that can't be decoded stays in its row and gets no caption. Started by
    `accelerate launch`, each process reads the whole dataset and captions shards of its own. A run that was killed
    goes on with the first missing shard, if dataset and model are still the same.

    Returns:
        `dict`: `shards`, `rows`, `captioned` and `undecodable` images in the output folder; `files` of a folder of
        images.

    Raises:
        ValueError: If the dataset, a column or the output folder does not fit.
    """
    rows = open_rows(config, [config.image_column])
    if config.long_caption_column in rows.column_names:
        raise ValueError(f"The dataset already has a column {config.long_caption_column!r}; name another one.")
    processor = AutoProcessor.from_pretrained(config.model)
    on_main_process(lambda: open_folder(config, fingerprint_inputs(config, rows)))
    model = AutoModelForImageTextToText.from_pretrained(
        config.model, dtype=config.dtype, device_map=config.device_map or this_process().device
    ).eval()

    def add_captions(shard):
        cells = shard[config.image_column]
        captions = [None] * len(cells)
        for indices, images in decode_batches(cells, range(len(cells)), config.batch_size):
            texts = caption_images(model, processor, images, config.prompt, config.max_new_tokens)
            for index, text in zip(indices, texts, strict=True):
                captions[index] = text
        undecodable = captions.count(None)
        counts = {"captioned": len(captions) - undecodable, "undecodable": undecodable}
        return {config.long_caption_column: captions}, counts

    return add_columns(config, rows, {config.long_caption_column: Value("string")}, add_captions)


@torch.no_grad()
def caption_images(
    model: PreTrainedModel, processor: ProcessorMixin, images: list[Image.Image], prompt: str, max_new_tokens: int
) -> list[str]:
    """Ask a model the same about each image, and decode its answers greedily.

    Args:
        model ([`~transformers.PreTrainedModel`]): An image-text-to-text model.
        processor ([`~transformers.ProcessorMixin`]): Its processor, with a chat template.
        images (`list[PIL.Image.Image]`): One batch.
        prompt (`str`): The question.
        max_new_tokens (`int`): Highest number of tokens in an answer.
    """
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for image in images
    ]
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        # Some models spend more tokens on some images, and an answer has to follow its question at once.
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(model.device, model.dtype)
    answers = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    texts = processor.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
