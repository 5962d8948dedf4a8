"""What thresholding does to strongly guided images: none, static and dynamic, over guidance from 1 to 15.

python benchmarks/thresholding.py --checkpoint FOLDER_OR_ID [--dataset runs/emoji/data] [--count 200]

Imagen's paper (arXiv 2205.11487, section 2.3) says that strong guidance drives predicted images out of [-1, 1], that
static thresholding then saturates them, and that dynamic thresholding prevents this. A U-Net base draws one image for
each of evenly spaced captions of the test split, caption i with the seed i, for each guidance and thresholding:

- At the limits: share of the red, green and blue values that are 0 or 255.
- Saturation: mean of (max - min) / max over the red, green and blue of each pixel; 0 for grey, 1 for a pure colour.
- Distance and R-precision: as in benchmarks/scoreboard.py, if the dataset holds emoji with the labels that its network
  was trained on: the Frechet distance from all images of the split, and how well images fit their own captions.

The first line is the captions' own images, at the size of the base.
"""

import argparse
import json
import platform
import tempfile
import time
from datetime import date

import diffusers
import numpy as np
import torch
from datasets import Dataset
from scoreboard import BATCH_SIZE, Judge, commit, evenly, load_judge

from llamagen_hf import PixelDiffusionPipeline
from llamagen_hf.data.source import DataConfig
from llamagen_hf.diffusion.schedules import with_thresholding
from llamagen_hf.evaluation.images import open_images
from llamagen_hf.evaluation.sampling import SamplingConfig, sample_images
from llamagen_hf.local_paths import public_name


THRESHOLDINGS = ("none", "static", "dynamic")
GUIDANCE = (1.0, 2.0, 4.0, 7.0, 10.0, 15.0)
COLUMNS = (  # heading, key and format
    ("at the limits", "at_limits", ".1%"),
    ("saturation", "saturation", ".3f"),
    ("distance", "distance_to_test", ".2f"),
    ("R-precision", "r_precision", ".1%"),
)


def saturation(images: np.ndarray) -> dict[str, float]:
    """How saturated images are.

    Args:
        images (`np.ndarray` of shape `(batch, height, width, 3)`): uint8.

    Returns:
        `dict[str, float]`: `at_limits` and `saturation`, as on top of this file.
    """
    most, least = images.max(-1).astype(float), images.min(-1).astype(float)
    return {
        "at_limits": float(((images == 0) | (images == 255)).mean()),
        "saturation": float(((most - least) / most.clip(1)).mean()),
    }


def measure(
    pipe: PixelDiffusionPipeline,
    rows: Dataset,
    scales: list[float],
    judge: Judge | None = None,
    num_inference_steps: int | None = None,
) -> list[dict]:
    """Draw and measure images with each guidance and thresholding.

    Args:
        pipe ([`PixelDiffusionPipeline`]): A base that reads text. Its scheduler is the same again at the end.
        rows (`datasets.Dataset`): The images, with captions.
        scales (`list[float]`): Strengths of guidance.
        judge ([`Judge`], *optional*): Adds distance and R-precision.
        num_inference_steps (`int`, *optional*): Steps of an image; by default the checkpoint's.

    Returns:
        `list[dict]`: One of the rows' own images, then one for each guidance and thresholding.
    """
    captions, trained, results = list(rows["caption"]), pipe.scheduler, []
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}

    def look(source, facts: dict) -> None:
        images = np.concatenate(list(open_images(source, pipe.image_size).batches(BATCH_SIZE)))
        scores = {} if judge is None else judge.score(images, rows)
        results.append(facts | saturation(images) | scores)

    look(rows, {"guidance_scale": None, "thresholding": None})
    for scale in scales:
        for thresholding in THRESHOLDINGS:
            pipe.scheduler = with_thresholding(trained, thresholding)
            arguments = {"guidance_scale": scale} | steps
            config = SamplingConfig(len(rows), captions, batch_size=BATCH_SIZE, arguments=arguments)
            with tempfile.TemporaryDirectory() as folder:
                images = sample_images(pipe, config, folder)
                look(images, {"guidance_scale": scale, "thresholding": thresholding})
    pipe.scheduler = trained
    return results


def show(results: list[dict]) -> str:
    """The results as a Markdown table, without the columns that were not measured."""
    columns = [column for column in COLUMNS if column[1] in results[0]]
    lines = [
        f"| guidance | thresholding | {' | '.join(heading for heading, _, _ in columns)} |",
        "|---:|---" + len(columns) * "|---:" + "|",
    ]
    for row in results:
        drawn = row["thresholding"] is not None
        start = f"{row['guidance_scale']:g} | {row['thresholding']}" if drawn else "| real images"
        lines.append(f"| {start} | {' | '.join(format(row[key], form) for _, key, form in columns)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="Folder or Hub id of a U-Net base that reads text.")
    parser.add_argument("--dataset", default="runs/emoji/data", help="Images with captions and a test split.")
    parser.add_argument("--count", type=int, default=200, help="Captions to draw, the same for all lines.")
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE, help="Strengths of guidance.")
    parser.add_argument("--steps", type=int, help="Steps of an image; by default the checkpoint's.")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    pipe = PixelDiffusionPipeline.from_pretrained(args.checkpoint)
    if pipe.upsamples or not pipe.reads_text:
        parser.error(f"{args.checkpoint} is no base that reads text, so it has no guidance to measure")
    try:
        with_thresholding(pipe.scheduler, "dynamic")  # not all schedulers can
        rows = DataConfig(args.dataset).load("test")
    except ValueError as error:
        parser.error(str(error))
    if "caption" not in rows.column_names:
        parser.error(f"{args.dataset} has no column caption to draw from")
    if not 4 <= args.count <= len(rows):
        parser.error(f"--count is {args.count}; expected 4 to {len(rows)}, the size of the test split")
    judge = load_judge({"test": rows})
    if missing := sorted(set(judge.model.config.classes) - set(rows.column_names)):
        print(f"The dataset has no {', '.join(missing)}, so there is no distance of emoji to measure.\n")
        judge = None
    results = measure(pipe, evenly(rows, args.count), args.guidance, judge, args.steps)
    settings = pipe.sampling_settings(num_inference_steps=args.steps)
    print(
        f"## {date.today()}, thresholding of {public_name(args.checkpoint)} at {commit()}\n\n"
        f"torch {torch.__version__}, diffusers {diffusers.__version__}; {args.count} captions, "
        f"{settings['num_inference_steps']} steps of {type(pipe.scheduler).__name__}, quantile "
        f"{pipe.scheduler.config.dynamic_thresholding_ratio}; {(time.perf_counter() - start) / 60:.1f} minutes with "
        f"{torch.get_num_threads()} threads ({platform.machine()}).\n\n{show(results)}\n\n{json.dumps(results)}"
    )


if __name__ == "__main__":
    main()
