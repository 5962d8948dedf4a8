"""The models of a generator training: what it starts with, and the module that it optimizes."""

import random
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from datasets import ClassLabel, Dataset
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...conditioning.text import encode_tokens, load_text_encoder
from ...data.samples import BadRow
from ...training.text_encoder import build_text_encoder, train_text_tokenizer
from ..configuration import LlamaGenConfig
from ..conversion import VARIANTS
from ..modeling import LlamaGenForConditionalGeneration
from ..pipeline import AutoregressiveImagePipeline
from .codes import CodeSamples, reads_images, stored_dim
from .generator_config import GeneratorTrainingConfig


DROPOUTS = ("embedding_dropout", "residual_dropout", "ffn_dropout")
CORPUS_ROWS = 100_000  # enough to learn a small tokenizer's pairs from


def build_models(
    config: GeneratorTrainingConfig, rows: Dataset, codes_info: dict
) -> tuple[LlamaGenForConditionalGeneration, PreTrainedModel | None, PreTrainedTokenizerBase | None, bool]:
    """Build new models, or load those of `config.init_from` at the grid size of the codes.

    Args:
        config ([`GeneratorTrainingConfig`]): What to build or to load.
        rows (`datasets.Dataset`): Training rows, for the names of classes and the words of captions.
        codes_info (`dict`): The content of codes.json.

    Returns:
        `tuple`: The generator; the text encoder and its tokenizer, `None` where captions are not encoded during the
        training; and whether these two are new.

    Raises:
        ValueError: What is loaded does not fit the recipe or the codes.
    """
    grid_size, cleaning = codes_info["grid"][0], config.prompt_cleaning
    of_images = config.stored_states and reads_images(config.caption_templates)
    text_encoder = tokenizer = None
    if config.text_encoder is not None:
        text_encoder, tokenizer = load_text_encoder(config.text_encoder)
    if config.init_from is not None and not config.new_condition:
        folder = AutoregressiveImagePipeline.find_checkpoint(config.init_from)
        before = LlamaGenConfig.from_pretrained(folder / "transformer")
        found = before.conditioning
        if found != config.conditioning:
            raise ValueError(
                f"{config.init_from} is {found}-conditional, but conditioning is {config.conditioning!r}; "
                "new_condition: true would keep all but its path from the condition."
            )
        changes = {} if config.condition_rotary is None else {"condition_rotary": config.condition_rotary}
        if config.dropout is not None:
            changes |= dict.fromkeys(DROPOUTS, config.dropout)
        if config.lora_rank and changes.get("condition_rotary", before.condition_rotary) != before.condition_rotary:
            raise ValueError(
                f"An adapter reads its condition like its model, with condition_rotary {before.condition_rotary!r}; "
                f"leave condition_rotary ({config.condition_rotary!r}) out."
            )
        transformer = LlamaGenForConditionalGeneration.from_pretrained(
            folder / "transformer", grid_size=grid_size, dtype=torch.float32, **changes
        )
        if cleaning is not None and config.lora_rank and cleaning != transformer.config.prompt_cleaning:
            raise ValueError(
                f"An adapter cleans prompts like its model, by {transformer.config.prompt_cleaning!r} rules; "
                f"leave prompt_cleaning ({cleaning!r}) out."
            )
        transformer.config.prompt_cleaning = cleaning or transformer.config.prompt_cleaning
        _check_stored_states(config, codes_info, transformer.config)
        if text_encoder is None and not of_images and (folder / "text_encoder").is_dir():
            text_encoder = load_text_encoder(folder / "text_encoder")[0].float()
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        return transformer, text_encoder, tokenizer, False

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
            "condition_dim": _stored_dim(config, codes_info) or text_encoder.config.hidden_size,
            "id2label": None,
        }
    else:
        condition = _classes(config, rows)
    transformer = _new_transformer(config, codes_info, condition)
    _check_stored_states(config, codes_info, transformer.config)
    return transformer, text_encoder, tokenizer, is_new


def _stored_dim(config: GeneratorTrainingConfig, codes_info: dict) -> int | None:
    """Width of the stored states; `None` where captions are encoded during the training."""
    if not config.stored_states or config.text_encoder is not None:
        return None
    return stored_dim(codes_info, config.caption_templates)


def _stored_cleaning(config: GeneratorTrainingConfig, codes_info: dict) -> str | None:
    """The cleaning of the prompts of stored states; codes that do not state it are older than the choice."""
    of_text = config.stored_states and not reads_images(config.caption_templates)
    return codes_info.get("prompt_cleaning", "released") if of_text else None


def _check_stored_states(config: GeneratorTrainingConfig, codes_info: dict, model: LlamaGenConfig) -> None:
    """Raise a `ValueError` if the generator can't read the stored states."""
    if not config.stored_states:
        return
    stored, cleaning = _stored_cleaning(config, codes_info), model.prompt_cleaning
    if stored is not None and stored != cleaning:
        raise ValueError(
            f"The stored text states are of prompts cleaned by {stored!r} rules, but this model cleans by "
            f"{cleaning!r} rules; run extract_codes with prompt_cleaning: {cleaning}."
        )
    width = stored_dim(codes_info, config.caption_templates)
    if width != model.condition_dim:
        raise ValueError(f"The stored states are {width} wide, but the generator reads {model.condition_dim}.")
    if reads_images(config.caption_templates) and model.condition_length != 1:
        raise ValueError(
            f"condition_length is {model.condition_length}; the embedding of an image is one position, so set it to 1."
        )


def _classes(config: GeneratorTrainingConfig, rows: Dataset) -> dict:
    """The configuration of a condition on classes: as many as the recipe says or the label column names."""
    if config.label_column not in rows.features:
        raise ValueError(f"The codes have no column {config.label_column!r}; they have {rows.column_names}.")
    feature = rows.features[config.label_column]
    names = dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else None
    if config.num_classes is None and names is None:
        raise ValueError(
            f"The column {config.label_column!r} does not say how many classes there are; set num_classes."
        )
    count = config.num_classes or len(names)
    return {"conditioning": "class", "condition_length": 1, "num_classes": count, "id2label": names}


def _new_transformer(
    config: GeneratorTrainingConfig, codes_info: dict, condition: dict
) -> LlamaGenForConditionalGeneration:
    settings = condition | {
        "grid_size": codes_info["grid"][0],
        "condition_dropout": config.condition_dropout,
        "condition_rotary": config.condition_rotary,
    }
    if config.dropout is not None:
        settings |= dict.fromkeys(DROPOUTS, config.dropout)
    if config.new_condition:
        return _with_new_condition(config.init_from, settings)
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }
    sizes = VARIANTS[config.variant] if config.variant else sizes
    transformer = LlamaGenForConditionalGeneration(
        LlamaGenConfig(vocab_size=codes_info["vocab_size"], **sizes, **settings)
    )
    nn.init.zeros_(transformer.lm_head.weight)  # all codes equally likely at the start, as in the released training
    return transformer


def _with_new_condition(init_from: str, settings: dict) -> LlamaGenForConditionalGeneration:
    """The generator of a pipeline, whose path from the condition is new."""
    folder = AutoregressiveImagePipeline.find_checkpoint(init_from) / "transformer"
    old = LlamaGenForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    new = LlamaGenForConditionalGeneration(LlamaGenConfig.from_pretrained(folder, **settings))
    weights, codes = old.state_dict(), slice(old.config.vocab_size)  # after codes' embeddings come those of classes
    with torch.no_grad():
        new.model.embed_tokens.weight[codes] = weights.pop("model.embed_tokens.weight")[codes]
    of_condition = ("model.text_projector.", "model.uncond_embedding.")
    new.load_state_dict({k: v for k, v in weights.items() if not k.startswith(of_condition)}, strict=False)
    return new


def _captions(config: GeneratorTrainingConfig, rows: Dataset) -> Iterator[str]:
    samples, rng = CodeSamples(rows, config.caption_templates), random.Random(config.seed)
    for row in islice(rows.select_columns(samples.columns), CORPUS_ROWS):
        for _ in range(3):
            try:
                yield samples(row, rng)["caption"]
            except BadRow:  # counted when the training reads it
                break


class ConditionToCodes(nn.Module):
    """The Llama, and the text encoder if it is trained too, as one module for optimizer and launcher.

    Args:
        transformer ([`LlamaGenForConditionalGeneration`]): The generator.
        text_encoder (`torch.nn.Module`, *optional*): Encodes captions that are given as tokens.
        code_noise (`float`, *optional*, defaults to 0): Largest share of an image's input codes that training replaces
            by random ones. Each image of a batch draws its own share, uniformly from 0 on.
    """

    # At the rate that suits a small Llama, a new projector that is trained with it grows one large vector for all
    # prompts within a few hundred steps, and no longer tells them apart. So these can have a slower one.
    text_path = ("text_encoder.", "transformer.model.text_projector.", "transformer.model.uncond_embedding.")

    def __init__(
        self,
        transformer: LlamaGenForConditionalGeneration,
        text_encoder: nn.Module | None = None,
        code_noise: float = 0.0,
    ):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.code_noise = code_noise
        self._compiled_loss = None

    def compile_training(self) -> None:
        """Compile the loss of training batches, which have one size. Measuring, with its odd last batch, is not."""
        self._compiled_loss = torch.compile(self._loss, dynamic=False)

    def forward(self, codes: torch.LongTensor, without_condition: bool = False, **condition) -> torch.Tensor:
        """Mean cross-entropy of the codes, in nats.

        Args:
            codes (`torch.LongTensor` of shape `(batch, codes)`): Code grids in raster order.
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Class ids.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch, words)`, *optional*): Tokenized captions.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Text states in place of tokens.
            prompt_attention_mask (`torch.LongTensor` of shape `(batch, condition_length)`, *optional*): Their mask.
            without_condition (`bool`, *optional*, defaults to `False`): Replace the condition by the null condition.

        Returns:
            `torch.Tensor`: A scalar.
        """
        loss = self._compiled_loss if self.training and self._compiled_loss is not None else self._loss
        inputs = codes[:, :-1]
        if self.training and self.code_noise:
            share = self.code_noise * torch.rand(len(inputs), 1, device=inputs.device)
            is_noise = torch.rand(inputs.shape, device=inputs.device) < share
            inputs = torch.where(is_noise, torch.randint_like(inputs, self.transformer.config.vocab_size), inputs)
        return loss(codes, inputs, without_condition=without_condition, **condition)

    def _loss(
        self,
        codes: torch.LongTensor,
        inputs: torch.LongTensor,
        class_labels: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.LongTensor | None = None,
        without_condition: bool = False,
    ) -> torch.Tensor:
        config = self.transformer.config
        if class_labels is not None:
            ids = torch.full_like(class_labels, config.num_classes) if without_condition else class_labels
            input_ids = torch.cat([config.vocab_size + ids[:, None], inputs], dim=1)
            return self.transformer(input_ids, use_cache=False, labels=codes).loss
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = encode_tokens(
                self.text_encoder, input_ids, attention_mask, config.condition_length
            )
        if without_condition:
            null = self.transformer.model.uncond_embedding(len(codes))
            prompt_embeds = null.to(prompt_embeds.dtype)
        return self.transformer(
            inputs,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            use_cache=False,
            labels=codes,
        ).loss


@torch.no_grad()
def mean_loss(model: ConditionToCodes, batches: Iterable[dict], without_condition: bool = False) -> tuple[float, int]:
    """Mean cross-entropy in nats over all codes of `batches`, and the number of rows."""
    device = next(model.parameters()).device  # the module may come wrapped
    was_training = model.training
    model.eval()
    total, rows = 0.0, 0
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        total += model(**batch, without_condition=without_condition).item() * len(batch["codes"])
        rows += len(batch["codes"])
    model.train(was_training)
    return total / max(rows, 1), rows


def flops_per_image(model: LlamaGenForConditionalGeneration) -> float:
    """Count the floating-point operations of one training sequence, forward and backward, without recomputation.

    6 for each weight that multiplies a position, and 12 times layers, width and length for its attention (PaLM, arXiv
    2204.02311, appendix B). Embeddings are looked up, not multiplied.
    """
    config = model.config
    length = config.condition_length + config.num_codes - 1
    embeddings = {"model.embed_tokens.weight", "model.uncond_embedding.weight"}
    weights = sum(p.numel() for name, p in model.named_parameters() if name not in embeddings)
    width = config.num_attention_heads * config.head_dim
    return length * (6 * weights + 12 * config.num_hidden_layers * width * length)
