"""How well a checkpoint generates emoji, judged by a small network that was trained to tell emoji apart.

make scoreboard [CHECKPOINT=FOLDER_OR_ID]
python benchmarks/scoreboard.py [--checkpoint emoji] [--dataset runs/emoji/data] [--count 419] [--num-candidates 1]

Takes evenly spaced captions of each split of pipelines/split_emoji.py and generates one image for each, caption i with
the seed i: emoji of the training, emoji in a style that they were not trained in, and new emoji. The generated
images, the captions' own images, and their reconstructions by the image tokenizer are measured side by side; the
reconstructions are the best that the generator could reach. Each line of the first table is a set of images:

- Frechet distance, precision and recall (k = 3) compare it with all images of a split, in the features of the
  network in benchmarks/scoreboard, not of Inception: they are not FID, and can't be compared with numbers of another
  network. A set that is part of the split it is compared with scores nearly perfectly.
- Accuracies: how often the network names the subgroup, style or group of the caption's row.
- R-precision: how often it finds an image more similar to its own caption than to 99 others of the set.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from datasets import Dataset
from emoji_classifier import CLASSIFIER, EmojiClassifier, accuracies, caption_precision
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.conditioning.text import tokenize_prompts
from llamagen_hf.data.source import DataConfig
from llamagen_hf.evaluation import frechet_distance, precision_recall
from llamagen_hf.evaluation.images import Images, open_images
from llamagen_hf.evaluation.sampling import SamplingConfig, sample_images
from llamagen_hf.llamagen.training.generator_models import ConditionToCodes, mean_loss
from llamagen_hf.llamagen.training.vq_trainer import evaluate_tokenizer
from llamagen_hf.local_paths import public_name


SPLITS = ("test", "train")  # whose images all sets are compared with
UNSEEN_STYLE = "unseen_style"
BATCH_SIZE = 64  # images generated and encoded together


class Judge:
    """The network, and its features of the images of each split.

    Args:
        model (`EmojiClassifier`): The network.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the captions.
        splits (`dict[str, datasets.Dataset]`): Rows with images, captions and labels.
    """

    def __init__(self, model: EmojiClassifier, tokenizer: PreTrainedTokenizerBase, splits: dict[str, Dataset]):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.references = {split: self.look_at(rows) for split, rows in splits.items()}

    def look_at(self, source: Dataset | np.ndarray | Path | Images) -> torch.Tensor:
        """Features `(n, d)` of images, anything that `open_images` takes."""
        return self.model.look_at(open_images(source, self.model.config.image_size))

    def score(self, source: Dataset | np.ndarray | Path | Images, rows: Dataset) -> dict[str, float]:
        """All scores of images that show what `rows` say."""
        features, scores = self.look_at(source), {"images": len(rows)}
        for split, reference in self.references.items():
            scores[f"distance_to_{split}"] = frechet_distance(reference, features)
            scores[f"precision_{split}"], scores[f"recall_{split}"] = precision_recall(reference, features)
        named = accuracies(self.model, features, rows)
        scores |= {f"{label}_accuracy": accuracy for label, accuracy in named.items()}
        scores["r_precision"] = caption_precision(self.model, self.tokenizer, features, list(rows["caption"]))
        return scores


def load_judge(splits: dict[str, Dataset]) -> Judge:
    """The network in benchmarks/scoreboard, which compares with the images of `splits`."""
    model = EmojiClassifier.from_pretrained(CLASSIFIER, dtype=torch.float32)
    return Judge(model, AutoTokenizer.from_pretrained(CLASSIFIER / "tokenizer"), splits)


def evenly(rows: Dataset, count: int) -> Dataset:
    """`count` evenly spaced rows."""
    return rows.select([i * len(rows) // count for i in range(count)])


def as_batches(rows: Dataset, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Images as `images` `(batch, 3, size, size)` in [-1, 1]."""
    for batch in open_images(rows, size).batches(BATCH_SIZE):
        yield {"images": torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1}


def to_tensor(source: Dataset | np.ndarray | Path | Images, size: int) -> torch.Tensor:
    """All images of anything that `open_images` takes: `(n, 3, size, size)` in [-1, 1]."""
    return torch.cat([batch["images"] for batch in as_batches(source, size)])


def to_array(images: torch.Tensor) -> np.ndarray:
    """Images `(n, 3, height, width)`, nominally in [-1, 1], as `(n, height, width, 3)`, uint8."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@torch.no_grad()
def reconstruct(pipe: AutoregressiveImagePipeline, rows: Dataset) -> np.ndarray:
    """Reconstructions of images by the image tokenizer: `(n, size, size, 3)`, uint8."""
    return to_array(torch.cat([pipe.vq_model(batch["images"]).sample for batch in as_batches(rows, pipe.image_size)]))


@torch.no_grad()
def losses(pipe: AutoregressiveImagePipeline, rows: Dataset) -> dict[str, float]:
    """The generator's loss on images' codes, with their captions and without."""
    config, batches = pipe.transformer.config, []
    for i, batch in enumerate(as_batches(rows, pipe.image_size)):
        captions = list(rows["caption"])[i * BATCH_SIZE :][: len(batch["images"])]
        input_ids, mask = tokenize_prompts(pipe.tokenizer, captions, config.condition_length, config.prompt_cleaning)
        codes = pipe.vq_model.encode(batch["images"]).codes.flatten(1)
        batches.append({"codes": codes, "input_ids": input_ids, "attention_mask": mask})
    model = ConditionToCodes(pipe.transformer, pipe.text_encoder).eval()
    return {
        "loss": mean_loss(model, batches)[0],
        "loss_without_prompt": mean_loss(model, batches, without_condition=True)[0],
    }


def measure(
    pipe: AutoregressiveImagePipeline, judge: Judge, splits: dict[str, Dataset], count: int, num_candidates: int = 1
) -> dict:
    """Everything the scoreboard shows.

    Args:
        pipe ([`AutoregressiveImagePipeline`]): Generates from captions.
        judge ([`Judge`]): Scores the images.
        splits (`dict[str, datasets.Dataset]`): All rows of each split.
        count (`int`): Captions of each split, and images of each set; as many as there are, if there are fewer.
        num_candidates (`int`, *optional*, defaults to 1): Images to draw for each, of which the generator chooses one.

    Returns:
        `dict`: `sets`, the scores of each set of images by its name; and by split, the tokenizer's measurements and
        the generator's losses.
    """
    results, arguments = {"sets": {}}, {"num_candidates": num_candidates}
    for split, rows in splits.items():
        chosen = evenly(rows, min(count, len(rows)))
        results["sets"][f"{split} images"] = judge.score(chosen, chosen)
        results["sets"][f"{split} images, reconstructed"] = judge.score(reconstruct(pipe, chosen), chosen)
        with tempfile.TemporaryDirectory() as folder:
            prompts = list(chosen["caption"])
            config = SamplingConfig(len(chosen), prompts=prompts, batch_size=BATCH_SIZE, arguments=arguments)
            generated = sample_images(pipe, config, folder)
            results["sets"][f"drawn for {split} captions"] = judge.score(generated, chosen)  # RESULTS.md's name
        results[split] = evaluate_tokenizer(pipe.vq_model, as_batches(chosen, pipe.image_size)) | losses(pipe, chosen)
    return results


def show(results: dict) -> str:
    """The results as two Markdown tables."""
    distances = [f"{name} {split}" for split in SPLITS for name in ("distance to", "precision,", "recall,")]
    lines = [
        f"| | {' | '.join([*distances, 'subgroup', 'style', 'group', 'R-precision'])} |",
        "|---" + 10 * "|---:" + "|",
    ]
    for name, scores in results["sets"].items():
        cells = []
        for split in SPLITS:
            cells += [f"{scores[f'distance_to_{split}']:.2f}"]
            cells += [f"{scores[f'{share}_{split}']:.3f}" for share in ("precision", "recall")]
        labels = ("subgroup_accuracy", "style_accuracy", "group_accuracy", "r_precision")
        lines.append(f"| {name} | {' | '.join(cells + [f'{scores[label]:.1%}' for label in labels])} |")
    measured = [split for split in (*SPLITS, UNSEEN_STYLE) if split in results]
    lines += ["", f"| | {' | '.join(measured)} |", "|---" + len(measured) * "|---:" + "|"]
    for name, key, form in (
        ("PSNR of the tokenizer, dB", "psnr", ".2f"),
        ("SSIM of the tokenizer", "ssim", ".3f"),
        ("codes that are used", "codebook_usage", ".1%"),
        ("perplexity of the codes", "codebook_perplexity", ".0f"),
        ("loss of the generator, nats a code", "loss", ".3f"),
        ("... without its prompts", "loss_without_prompt", ".3f"),
    ):
        lines.append(f"| {name} | {' | '.join(format(results[split][key], form) for split in measured)} |")
    return "\n".join(lines)


def commit() -> str:
    """The commit that is checked out, with a mark if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="emoji", help="Folder or Hub id of a text-conditional pipeline.")
    parser.add_argument("--dataset", default="runs/emoji/data", help="The emoji, as split_emoji.py wrote them.")
    parser.add_argument("--count", type=int, default=419, help="Captions of each split to generate from.")
    parser.add_argument("--num-candidates", type=int, default=1, help="Images to draw for each, the best is kept.")
    args = parser.parse_args()
    start = time.perf_counter()
    pipe = AutoregressiveImagePipeline.from_pretrained(args.checkpoint)
    if pipe.condition_kind != "text":
        parser.error(f"{args.checkpoint} generates classes; the scoreboard needs a checkpoint that takes prompts")
    try:
        splits = {split: DataConfig(args.dataset).load(split) for split in SPLITS}
        splits[UNSEEN_STYLE] = DataConfig(args.dataset, test_split=UNSEEN_STYLE).load("test")
    except ValueError as error:
        parser.error(str(error))
    if not 4 <= args.count <= len(splits["test"]):
        parser.error(f"--count is {args.count}; expected 4 to {len(splits['test'])}, the size of the test split")
    judge = load_judge({split: splits[split] for split in SPLITS})
    weights = hashlib.sha256((CLASSIFIER / "model.safetensors").read_bytes()).hexdigest()
    results = measure(pipe, judge, splits, args.count, args.num_candidates)
    minutes, busy = (time.perf_counter() - start) / 60, time.process_time() / 60
    print(
        f"## {date.today()}, {public_name(args.checkpoint)} at {commit()}\n\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}; "
        f"{args.count} captions of each split, best of {args.num_candidates}, {pipe.sampling_settings()}; "
        f"network {weights[:8]}; "
        f"{minutes:.1f} minutes with {torch.get_num_threads()} threads, {busy:.1f} of a core's ({platform.machine()})."
        f"\n\n{show(results)}\n\n{json.dumps(results)}"
    )


if __name__ == "__main__":
    main()
