"""Train the network of the scoreboard on the emoji's Parquet files.

OMP_NUM_THREADS=1 python benchmarks/train_scoreboard.py [--dataset ../shared/data/emoji] [--output FOLDER]

It learns the subgroup, style and group of an image, and to tell its caption from those of other images in the batch.
A twentieth of the training emoji, in all styles, tones and genders at once, is held out for choosing settings; the
test split is measured once, at the end.
"""

import argparse
import json
import math
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers.optimization import get_scheduler
from emoji_classifier import (
    BATCH_SIZE,
    CLASSIFIER,
    EmojiClassifier,
    EmojiClassifierConfig,
    accuracies,
    caption_precision,
    class_ids,
    tokenize_captions,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llamagen_hf.data.source import DataConfig
from llamagen_hf.evaluation.images import open_images
from llamagen_hf.files import replace_result
from llamagen_hf.loading.checkpoint import EMOJI_CHECKPOINT


LABELS = {"subgroup": 1.0, "style": 0.3, "group": 0.3}  # weights of their losses
KEYWORDS, WORD_DROPOUT = 0.25, 0.1  # how often keywords replace the caption, and a word is dropped
TONES_AND_GENDERS = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "200D", "2640", "2642", "27A1", "FE0F"}
PEOPLE = {"1F468", "1F469", "1F9D1"}


def is_held_out(hexcode: str) -> bool:
    """Whether an emoji is held out; the same for all its tones, genders and directions."""
    points = [point for point in hexcode.upper().split("-") if point not in TONES_AND_GENDERS]
    family = "-".join("person" if point in PEOPLE else point for point in points)
    return zlib.crc32(family.encode()) % 20 == 0


def class_names(rows: Dataset) -> dict[str, list[str]]:
    """Classes of each label: the names of a `ClassLabel`, or the distinct texts of a column."""
    return {label: getattr(rows.features[label], "names", None) or sorted(set(rows[label])) for label in LABELS}


class TrainingRows:
    """Rows in memory, as randomly augmented batches.

    Args:
        rows (`datasets.Dataset`): Images, captions and labels.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the captions.
        config ([`EmojiClassifierConfig`]): Size of the images, and the classes.
    """

    def __init__(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: EmojiClassifierConfig):
        (images,) = open_images(rows, config.image_size).batches(len(rows))
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels = {label: class_ids(rows, label, names) for label, names in config.classes.items()}
        captions, tags = list(rows["caption"]), list(rows["tags"])
        # An image's keywords in its style: words that the captions of other emoji may have.
        keywords = [f"{' '.join(tag)}, {text.rpartition(', ')[2]}" for tag, text in zip(tags, captions, strict=True)]
        self.texts = torch.stack([tokenize_captions(tokenizer, texts) for texts in (captions, keywords)])
        # Texts and flags change their meaning when mirrored, and so do captions that name a side.
        groups = config.classes["group"]
        letters = torch.tensor([name in ("symbols", "flags", "travel-places") for name in groups])
        sides = torch.tensor([" left" in text or " right" in text for text in captions])
        self.may_flip = ~(letters[self.labels["group"]] | sides)

    def batch(self, indices: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Augmented images, captions or keywords with some words dropped, and labels."""
        images = change_images(self.images[indices].float() / 127.5 - 1, self.may_flip[indices])
        which = (torch.rand(len(indices)) < KEYWORDS).long()
        words = self.texts[which, indices]
        words = words.masked_fill(torch.rand(words.shape) < WORD_DROPOUT, 0)
        return images, words, {label: values[indices] for label, values in self.labels.items()}


def change_images(images: torch.Tensor, may_flip: torch.Tensor) -> torch.Tensor:
    """Shift, scale and rotate images a little, mirror half of those that may be, and change their colours slightly.

    The padding is white, and white pixels stay white.
    """
    count = len(images)
    ink = 1 - images  # 0 where the image is white
    angle = (torch.rand(count) * 2 - 1) * math.radians(8)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.12
    mirror = torch.where(may_flip & (torch.rand(count) < 0.5), -1.0, 1.0)
    shift = (torch.rand(count, 2) * 2 - 1) * 0.12  # 4 of 64 pixels
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos * mirror, -sin, shift[:, 0], sin * mirror, cos, shift[:, 1]], dim=1).view(count, 2, 3)
    ink = F.grid_sample(ink, F.affine_grid(matrix, ink.shape, align_corners=False), align_corners=False)
    strength = (1 + (torch.rand(count, 1, 1, 1) - 0.5) * 0.3) * (1 + (torch.rand(count, 3, 1, 1) - 0.5) * 0.1)
    return (1 - ink * strength).clamp(-1, 1)


def loss_of(model: EmojiClassifier, images: torch.Tensor, words: torch.Tensor, labels: dict) -> torch.Tensor:
    """Cross-entropies of the labels, and InfoNCE in both directions (CLIP)."""
    features = model.dropout(model.features(images.contiguous(memory_format=torch.channels_last)))
    losses = [
        LABELS[label] * F.cross_entropy(logits, labels[label], label_smoothing=0.1)
        for label, logits in model.classify(features).items()
    ]
    likeness = model.logit_scale.exp() * model.embed_features(features) @ model.embed_captions(words).T
    pairs = torch.arange(len(images))
    losses += [F.cross_entropy(likeness, pairs) / 2, F.cross_entropy(likeness.T, pairs) / 2]
    return sum(losses)


def evaluate(model: EmojiClassifier, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> dict[str, float]:
    """Accuracies and caption R-precision of a split's own images."""
    model.eval()
    features = model.look_at(open_images(rows, model.config.image_size))
    metrics = {f"{label} accuracy": value for label, value in accuracies(model, features, rows).items()}
    return metrics | {"R-precision": caption_precision(model, tokenizer, features, list(rows["caption"]))}


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="../shared/data/emoji")
    parser.add_argument("--output", type=Path, default=CLASSIFIER)
    parser.add_argument("--tokenizer", default=str(EMOJI_CHECKPOINT / "tokenizer"), help="Of the captions.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--hidden_sizes", type=int, nargs="+", default=[32, 64, 128, 192])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 1, 1, 1])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(args)


def main(args: list[str] | None = None) -> None:
    args = parse_args(args)
    torch.manual_seed(args.seed)
    data = DataConfig(dataset=args.dataset, image_size=64)
    train, test = data.load("train"), data.load("test")
    classes = class_names(train)
    held_out = [is_held_out(code) for code in train["hexcode"]]
    validation = train.select([i for i, held in enumerate(held_out) if held])
    train = train.select([i for i, held in enumerate(held_out) if not held])
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = EmojiClassifierConfig(
        layer_type="basic", embedding_size=32, hidden_sizes=args.hidden_sizes, depths=args.depths,
        classes=classes, vocab_size=len(tokenizer),
    )  # fmt: skip
    model = EmojiClassifier(config).to(memory_format=torch.channels_last)
    rows = TrainingRows(train, tokenizer, config)
    steps = len(train) // BATCH_SIZE
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == kind] for kind in (True, False))
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate)
    scheduler = get_scheduler("cosine", optimizer, None, steps, args.epochs * steps)
    print(f"{len(train)} images, {len(validation)} held out, {model.num_parameters():,} parameters", flush=True)
    for epoch in range(1, args.epochs + 1):
        model.train()
        total = 0.0
        for indices in torch.randperm(len(train))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            loss = loss_of(model, *rows.batch(indices))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item() / steps
        line = f"epoch {epoch}: loss {total:.3f}, {time.process_time() / 60:.1f} minutes"
        if epoch % 4 == 0 or epoch == args.epochs:
            line += f", held out {show(evaluate(model, tokenizer, validation))}"
        print(line, flush=True)

    model = model.half().float().to(memory_format=torch.contiguous_format)
    metrics = {"held out": evaluate(model, tokenizer, validation), "test": evaluate(model, tokenizer, test)}
    args.output.mkdir(parents=True, exist_ok=True)

    def save(folder: Path) -> None:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")

    replace_result(args.output, "config.json", save)
    for split, values in metrics.items():
        print(f"{split}: {show(values)}")


def show(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in metrics.items())


if __name__ == "__main__":
    main()
