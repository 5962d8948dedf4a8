"""Recaptioning: long captions of images by a vision-language model.

LlamaGen (arXiv 2406.06525) trains its second text-conditional stage on 10M images with long captions by LLaVA.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature
from datasets.utils.file_utils import is_local_path
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..processes import on_main_process, this_process
from .bad_rows import BadRow
from .fingerprint import Inputs, fingerprint_checkpoint, fingerprint_dataset
from .images import decode_image
from .shards import COUNTS, open_folder, open_rows, shard_path, write_shard
from .source import files_report


logger = logging.getLogger(__name__)

ROW_GROUP_SIZE = 100  # rows with images are large, and a reader holds a row group at a time


@dataclass
class RecaptionConfig:
    """One run of [`recaption`]: the recipe's section `recaption`."""

    dataset: str = field(metadata={"help": "Hub id, folder, or file pattern such as 'images/*.parquet'."})
    output_dir: str = field(metadata={"help": "Folder for the rows with long captions, as Parquet shards."})
    split: str = field(default="train", metadata={"help": "Split to read."})
    model: str = field(
        default="llava-hf/llava-1.5-7b-hf",
        metadata={"help": "Folder or Hub id of an image-text-to-text model with a chat template."},
    )
    prompt: str = field(
        default="Describe this image in as much detail as possible.", metadata={"help": "What to ask of each image."}
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    long_caption_column: str = field(default="long_caption", metadata={"help": "New column for the long captions."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of a caption at the most."})
    batch_size: int = field(default=16, metadata={"help": "Images captioned at a time."})
    dtype: str = field(default="auto", metadata={"help": "bfloat16, float32, ...; auto: the checkpoint's own."})
    device_map: str | None = field(
        default=None, metadata={"help": "auto spreads one model over all devices; unset: one model for each process."}
    )
    rows_per_shard: int = field(default=1000, metadata={"help": "Rows of an output file, held in memory."})
    overwrite: bool = field(default=False, metadata={"help": "Start over: remove the shards in output_dir first."})


def recaption(config: RecaptionConfig) -> dict:
    """Add long captions to a dataset of images; all its columns stay, so the short captions do.

    Captions are decoded greedily. An image that can't be decoded stays in its row and gets no caption. Started by
    `accelerate launch`, each process reads the whole dataset and captions shards of its own. A killed run goes on with
    the first shard that is missing, if dataset and model are still the same.

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
    on_main_process(lambda: open_folder(config, inputs_of(config, rows)))
    model = AutoModelForImageTextToText.from_pretrained(
        config.model, dtype=config.dtype, device_map=config.device_map or this_process().device
    ).eval()

    def add_captions(shard):
        cells = shard[config.image_column]
        captions = [None] * len(cells)
        for indices, pictures in image_batches(cells, range(len(cells)), config.batch_size):
            texts = caption_images(model, processor, pictures, config.prompt, config.max_new_tokens)
            for index, text in zip(indices, texts, strict=True):
                captions[index] = text
        undecodable = captions.count(None)
        counts = {"captioned": len(captions) - undecodable, "undecodable": undecodable}
        return {config.long_caption_column: captions}, counts

    return add_columns(config, rows, {config.long_caption_column: Value("string")}, add_captions)


def inputs_of(config, rows: IterableDataset) -> Inputs:
    """Fingerprints of a stage's images and model."""
    inputs = fingerprint_dataset(config.dataset, config.output_dir, [rows], config.image_column)
    return inputs | {"the model": fingerprint_checkpoint(config.model)}


@torch.no_grad()
def caption_images(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: list[Image.Image], prompt: str, max_new_tokens: int
) -> list[str]:
    """Ask the same about each image and decode the answers greedily."""
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for image in pictures
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


def image_batches(
    cells: list[dict | None], indices: Iterable[int], batch_size: int
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """The images at `indices` that can be decoded, as RGB, in batches with their indices."""

    def decode():
        for index in indices:
            try:
                yield index, decode_image(cells[index])
            except BadRow:
                continue

    decoded = decode()
    while batch := list(islice(decoded, batch_size)):
        yield [index for index, _ in batch], [image for _, image in batch]


def add_columns(
    config, rows: IterableDataset, features: dict[str, Value], compute: Callable[[dict], tuple[dict, dict]]
) -> dict:
    """Write `rows` with new or changed columns, shard by shard; each process takes every n-th shard that is missing.

    Args:
        config: Settings of the stage.
        rows (`datasets.IterableDataset`): Rows with images in `config.image_column`.
        features (`dict[str, datasets.Value]`): Types of the columns.
        compute (`Callable`): From a shard's columns to those columns, and numbers to add up for the report.

    Returns:
        `dict`: `shards` and `rows` in the output folder, the sums of what `compute` counted, and `files`.
    """
    features = Features({**rows.features, config.image_column: ImageFeature(), **features})
    rows = rows.cast_column(config.image_column, ImageFeature(decode=False))
    process = this_process()
    for index, shard in enumerate(rows.iter(batch_size=config.rows_per_shard)):
        path = shard_path(config, index)
        if index % process.num_processes != process.process_index or path.exists():
            continue
        # A file that is not there can't be stored; as a missing image it counts as undecodable.
        shard[config.image_column] = [None if _is_absent(cell) else cell for cell in shard[config.image_column]]
        columns, counts = compute(shard)
        table = Dataset.from_dict(shard | columns, features=features).data.table
        write_shard(table, path, counts, ROW_GROUP_SIZE)
        logger.info("%s: %d rows, %s", path.name, len(table), counts)
    process.wait_for_everyone()

    report = Counter(shards=0, rows=0)
    for path in Path(config.output_dir).glob("train-*.parquet"):
        metadata = pq.read_metadata(path)
        report.update(json.loads(metadata.metadata[COUNTS]) | {"shards": 1, "rows": metadata.num_rows})
    return dict(report) | files_report(config.dataset)


def _is_absent(cell: dict | None) -> bool:
    """Whether an image is nothing but the path of a file that is not on this machine."""
    path = cell and cell["bytes"] is None and cell["path"]
    return bool(path) and is_local_path(path) and not Path(path).is_file()
