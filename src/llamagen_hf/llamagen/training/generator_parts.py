"""The models that a generator training starts with."""

import random
from dataclasses import dataclass
from itertools import islice

import torch
from datasets import ClassLabel, Dataset
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...conditioning.text import load_text_encoder
from ...data.samples import BadRow
from ..configuration import LlamaGenConfig
from ..conversion import VARIANTS
from ..modeling import LlamaGenForConditionalGeneration
from ..pipeline import AutoregressiveImagePipeline
from .codes import CodeSamples
from .generator_config import GeneratorTrainingConfig
from .text_encoder import build_text_encoder, train_text_tokenizer


CORPUS_ROWS = 100_000  # enough to learn a small tokenizer's pairs from


@dataclass
class GeneratorParts:
    """Generator, and text encoder and its tokenizer where captions are encoded on the fly."""

    transformer: LlamaGenForConditionalGeneration
    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    text_encoder_is_new: bool


def build_parts(config: GeneratorTrainingConfig, rows: Dataset, codes_info: dict) -> GeneratorParts:
    """New models, or those of `config.init_from` at the grid size of the codes.

    Args:
        config ([`GeneratorTrainingConfig`]): What to build or to load.
        rows (`datasets.Dataset`): Training rows, for the names of classes and the words of captions.
        codes_info (`dict`): What [`~llamagen_hf.llamagen.training.extraction.extract_codes`] recorded.

    Raises:
        ValueError: If what is loaded does not fit the recipe or the codes.
    """
    grid_size, cleaning = codes_info["grid"][0], config.prompt_cleaning
    text_encoder = tokenizer = None
    if config.text_encoder is not None:
        text_encoder, tokenizer = load_text_encoder(config.text_encoder)
    if config.init_from is not None:
        folder = AutoregressiveImagePipeline.find_checkpoint(config.init_from)
        found = LlamaGenConfig.from_pretrained(folder / "transformer").conditioning
        if found != config.conditioning:
            raise ValueError(
                f"{config.init_from} is {found}-conditional, but conditioning is {config.conditioning!r}."
            )
        transformer = LlamaGenForConditionalGeneration.from_pretrained(
            folder / "transformer", grid_size=grid_size, dtype=torch.float32
        )
        if cleaning is not None and config.lora_rank and cleaning != transformer.config.prompt_cleaning:
            raise ValueError(
                f"An adapter cleans prompts as the model it is for, by {transformer.config.prompt_cleaning!r} rules; "
                f"leave prompt_cleaning ({cleaning!r}) out."
            )
        transformer.config.prompt_cleaning = cleaning or transformer.config.prompt_cleaning
        _check_stored_states(config, codes_info, transformer.config.prompt_cleaning)
        if text_encoder is None and (folder / "text_encoder").is_dir():
            text_encoder = load_text_encoder(folder / "text_encoder")[0].float()
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        return GeneratorParts(transformer, text_encoder, tokenizer, text_encoder_is_new=False)

    is_new = config.conditioning == "text" and text_encoder is None and not config.stored_states
    if is_new:
        corpus = _captions(config, rows)
        tokenizer = train_text_tokenizer(corpus, config.text_vocab_size, config.condition_length)
        text_encoder = build_text_encoder(tokenizer, config.text_width, config.text_layers, config.text_heads)
    if config.conditioning == "text":
        condition = {
            "conditioning": "text",
            "condition_length": config.condition_length,
            "prompt_cleaning": cleaning or _stored_cleaning(config, codes_info) or "unicode",
            "condition_dim": codes_info["text_dim"] if text_encoder is None else text_encoder.config.hidden_size,
        }
    else:
        condition = {"num_classes": count_classes(config, rows), "id2label": class_names(config, rows)}
    _check_stored_states(config, codes_info, condition.get("prompt_cleaning"))
    return GeneratorParts(_new_transformer(config, codes_info, condition), text_encoder, tokenizer, is_new)


def _stored_cleaning(config: GeneratorTrainingConfig, codes_info: dict) -> str | None:
    """How the prompts of stored states were cleaned; codes that do not say it are older than the choice."""
    return codes_info.get("prompt_cleaning", "released") if config.stored_states else None


def _check_stored_states(config: GeneratorTrainingConfig, codes_info: dict, cleaning: str | None) -> None:
    stored = _stored_cleaning(config, codes_info)
    if stored is not None and stored != cleaning:
        raise ValueError(
            f"The stored text states are those of prompts cleaned by {stored!r} rules, but this model cleans by "
            f"{cleaning!r} ones; run extract_codes with prompt_cleaning: {cleaning}."
        )


def count_classes(config: GeneratorTrainingConfig, rows: Dataset) -> int:
    """Number of classes: the recipe's, else as many as the label column names."""
    names = class_names(config, rows)
    if config.num_classes is None and names is None:
        raise ValueError(
            f"The column {config.label_column!r} does not say how many classes there are; set num_classes."
        )
    return config.num_classes or len(names)


def class_names(config: GeneratorTrainingConfig, rows: Dataset) -> dict[int, str] | None:
    """Names of the classes by id, if the label column holds them."""
    if config.label_column not in rows.features:
        raise ValueError(f"The codes have no column {config.label_column!r}; they have {rows.column_names}.")
    feature = rows.features[config.label_column]
    return dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else None


def _new_transformer(config: GeneratorTrainingConfig, codes_info: dict, condition: dict):
    if config.variant is not None and config.variant not in VARIANTS:
        raise ValueError(f"There is no variant {config.variant!r}; expected one of {', '.join(VARIANTS)}.")
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }
    transformer = LlamaGenForConditionalGeneration(
        LlamaGenConfig(
            vocab_size=codes_info["vocab_size"],
            grid_size=codes_info["grid"][0],
            embedding_dropout=config.dropout,
            residual_dropout=config.dropout,
            ffn_dropout=config.dropout,
            condition_dropout=config.condition_dropout,
            **(VARIANTS[config.variant] if config.variant else sizes),
            **condition,
        )
    )
    nn.init.zeros_(transformer.lm_head.weight)  # all codes equally likely at the start, as in the released training
    return transformer


def _captions(config: GeneratorTrainingConfig, rows: Dataset):
    samples, rng = CodeSamples(rows, config.caption_templates), random.Random(config.seed)
    for row in islice(rows.select_columns(samples.columns), CORPUS_ROWS):
        for _ in range(3):
            try:
                yield samples(row, rng)["caption"]
            except BadRow:  # counted when it is trained on
                break
