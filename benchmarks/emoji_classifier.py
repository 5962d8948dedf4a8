"""The network that scores generated emoji: what an image shows, in which style, and how well it fits a caption.

A small ResNet of transformers (arXiv 1512.03385) with a linear head for each label, and CLIP's contrastive pair of
projections (arXiv 2103.00020) beside them, the text side being a bag of word pieces.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ResNetConfig, ResNetModel

from llamagen_hf.evaluation.images import Images
from llamagen_hf.evaluation.text import r_precision


CLASSIFIER = Path(__file__).parent / "scoreboard"  # the trained weights, with the tokenizer they read captions by
CAPTION_LENGTH = 32  # word pieces; longer ones are cut
BATCH_SIZE = 128


@strict
class EmojiClassifierConfig(ResNetConfig):
    r"""Sizes and classes of [`EmojiClassifier`]; the sizes of the ResNet are [`~transformers.ResNetConfig`]'s.

    Args:
        image_size (`int`, *optional*, defaults to 64): Side of the images it looks at.
        classes (`dict[str, list[str]]`, *optional*): Names of the classes of each label, by column of the dataset.
        vocab_size (`int`, *optional*, defaults to 2048): Word pieces of the tokenizer.
        word_size (`int`, *optional*, defaults to 192): Width of their vectors.
        projection_dim (`int`, *optional*, defaults to 128): Width of the space of images and captions.
        feature_dropout (`float`, *optional*, defaults to 0.2): Dropout of the features before the heads.
    """

    model_type = "emoji_classifier"

    image_size: int = 64
    classes: dict | None = None
    vocab_size: int = 2048
    word_size: int = 192
    projection_dim: int = 128
    feature_dropout: int | float = 0.2


class EmojiClassifier(PreTrainedModel):
    """Features of images, and from them labels and the similarity to captions.

    Args:
        config ([`EmojiClassifierConfig`]): Its sizes and classes.
    """

    config_class = EmojiClassifierConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EmojiClassifierConfig):
        super().__init__(config)
        width = config.hidden_sizes[-1]
        self.resnet = ResNetModel(config)
        self.dropout = nn.Dropout(config.feature_dropout)
        self.heads = nn.ModuleDict({label: nn.Linear(width, len(names)) for label, names in config.classes.items()})
        self.picture_projection = nn.Linear(width, config.projection_dim)  # the name of a saved weight
        self.words = nn.EmbeddingBag(config.vocab_size, config.word_size, mode="mean", padding_idx=0)
        self.text_projection = nn.Sequential(
            nn.Linear(config.word_size, 2 * config.word_size),
            nn.GELU(),
            nn.Linear(2 * config.word_size, config.projection_dim),
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # CLIP's start, a temperature of 0.07
        self.post_init()

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Of images `(batch, 3, image_size, image_size)` in [-1, 1]: `(batch, hidden_sizes[-1])`, at least 0."""
        return self.resnet(pixel_values).pooler_output.flatten(1)

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `(batch, classes)` of each label."""
        return {label: head(features) for label, head in self.heads.items()}

    def embed_features(self, features: torch.Tensor) -> torch.Tensor:
        """Embeddings of images beside those of captions: `(batch, projection_dim)` of length 1."""
        return F.normalize(self.picture_projection(features), dim=-1)

    def embed_captions(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Embeddings of tokenized captions `(batch, n)`, padded with 0: `(batch, projection_dim)` of length 1."""
        return F.normalize(self.text_projection(self.words(input_ids)), dim=-1)

    @torch.no_grad()
    def look_at(self, images: Images) -> torch.Tensor:
        """[`features`] of images that were opened at `image_size`."""
        batches = (torch.from_numpy(batch).permute(0, 3, 1, 2) for batch in images.batches(BATCH_SIZE))
        return torch.cat([self.features(batch.float() / 127.5 - 1) for batch in batches])


def tokenize_captions(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> torch.LongTensor:
    """Captions as [`EmojiClassifier.embed_captions`] takes them: `(batch, CAPTION_LENGTH)`."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=CAPTION_LENGTH, return_tensors="pt"
    ).input_ids


def accuracies(model: EmojiClassifier, features: torch.Tensor, rows) -> dict[str, float]:
    """Share of the images whose labels are those of their rows, by label."""
    with torch.no_grad():
        logits = model.classify(features)
    return {
        label: (values.argmax(-1) == class_ids(rows, label, model.config.classes[label])).float().mean().item()
        for label, values in logits.items()
    }


def class_ids(rows, label: str, names: list[str]) -> torch.LongTensor:
    """The classes of rows, as indices into `names`: `(rows,)`."""
    values = list(rows[label])
    if isinstance(values[0], str):
        values = [names.index(name) for name in values]
    return torch.tensor(values)


def caption_precision(
    model: EmojiClassifier,
    tokenizer: PreTrainedTokenizerBase,
    features: torch.Tensor,
    captions: list[str],
    num_candidates: int = 100,
) -> float:
    """R-precision: how often an image is more similar to its own caption than to all others of `num_candidates`.

    See [`~llamagen_hf.evaluation.text.r_precision`]; with fewer captions, all of them are candidates.
    """
    with torch.no_grad():
        texts = model.embed_captions(tokenize_captions(tokenizer, captions))
        images = model.embed_features(features)
    return r_precision(images, texts, num_candidates=min(num_candidates, len(captions)))
