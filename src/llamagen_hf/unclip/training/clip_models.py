"""The CLIP of a training: a new one with its own tokenizer, or one to go on with."""

import json
from collections.abc import Iterable

from datasets import Dataset, IterableDataset
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, ProcessorMixin

from ...arguments import FieldError
from ...clip import load_clip
from ...data.captions import caption_corpus
from ...data.source import DataConfig
from .clip_config import CLIPTrainingConfig


WORD_END = "</w>"
MARKS = ("<|startoftext|>", "<|endoftext|>")  # the last ids, as in the released vocabulary


def build_clip(
    config: CLIPTrainingConfig, data: DataConfig, rows: Dataset | IterableDataset
) -> tuple[CLIPModel, ProcessorMixin]:
    """Build a new CLIP, or load that of `config.init_from`.

    Args:
        config ([`CLIPTrainingConfig`]): What to build or to load.
        data ([`~llamagen_hf.data.source.DataConfig`]): Says how large the images are.
        rows (`datasets.Dataset` or `datasets.IterableDataset`): Training rows, for the words of their captions.

    Returns:
        `tuple[CLIPModel, ProcessorMixin]`: The model, in float32, and its processor.

    Raises:
        ValueError: What is loaded is no CLIP, or does not fit the data; or sizes do not fit each other.
    """
    if config.init_from is not None:
        return _load(config.init_from, data.image_size)
    if data.image_size % config.patch_size:
        raise FieldError(
            "patch_size", f"image_size is {data.image_size}; expected a multiple of patch_size ({config.patch_size})."
        )
    for part in ("vision", "text"):
        width, heads = getattr(config, f"{part}_width"), getattr(config, f"{part}_heads")
        if width % heads:
            message = f"{part}_width is {width}; expected a multiple of {part}_heads ({heads})."
            raise FieldError(f"{part}_width", message)
    captions = caption_corpus(rows, config.caption_templates, config.seed)
    tokenizer = train_clip_tokenizer(captions, config.text_vocab_size, config.text_length)
    return _new_clip(config, data.image_size, tokenizer), _new_processor(data.image_size, tokenizer)


def train_clip_tokenizer(captions: Iterable[str], vocab_size: int, length: int) -> CLIPTokenizer:
    """Train a tokenizer of CLIP's class, which can encode any string: byte-level BPE of lower-cased words.

    Args:
        captions (`Iterable[str]`): Text to learn pairs from.
        vocab_size (`int`): Number of tokens at most; 256 bytes, the same at the end of a word, and two marks included.
        length (`int`): Longest text in tokens, with the two marks.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fixed = [*alphabet, *(letter + WORD_END for letter in alphabet)]
    least = len(fixed) + len(MARKS)
    if vocab_size < least:
        message = f"text_vocab_size is {vocab_size}; a tokenizer of CLIP has at least {least} tokens."
        raise FieldError("text_vocab_size", message)
    learnt = CLIPTokenizer().backend_tokenizer  # which brings CLIP's rules of normalizing text and of cutting words
    # It counts only those letters at the end of a word that it has seen. What it learns beyond the size is left out.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False
    )
    learnt.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learnt.to_str())["model"]["merges"]]
    merges = merges[: vocab_size - least]
    tokens = dict.fromkeys([*fixed, *("".join(pair) for pair in merges), *MARKS])
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def _load(path: str, image_size: int) -> tuple[CLIPModel, ProcessorMixin]:
    try:
        clip, processor = load_clip(path)
    except OSError as error:
        raise ValueError(f"init_from can't be loaded: {error}") from error
    if not isinstance(clip, CLIPModel):
        raise ValueError(f"init_from is {type(clip).__name__}; expected a CLIPModel.")
    size = clip.config.vision_config.image_size
    if size != image_size:
        raise ValueError(f"image_size is {image_size}, but the CLIP of init_from takes images of {size} pixels.")
    return clip.float(), processor


def _new_clip(config: CLIPTrainingConfig, image_size: int, tokenizer: CLIPTokenizer) -> CLIPModel:
    def sizes(part: str) -> dict:
        width = getattr(config, f"{part}_width")
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": getattr(config, f"{part}_layers"),
            "num_attention_heads": getattr(config, f"{part}_heads"),
            "projection_dim": config.projection_dim,  # for the classes of one encoder with its projection
        }

    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": config.text_length, **marks}
    vision = {"image_size": image_size, "patch_size": config.patch_size}
    return CLIPModel(
        CLIPConfig(
            text_config=text | sizes("text"),
            vision_config=vision | sizes("vision"),
            projection_dim=config.projection_dim,
        )
    )


def _new_processor(image_size: int, tokenizer: CLIPTokenizer) -> CLIPProcessor:
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,  # pixels in [-1, 1], as everywhere in this package
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)
