"""What an upsampler is worth: seconds and quality beside bicubic enlargement, and over numbers of steps.

python benchmarks/upsampling.py --upsampler FOLDER_OR_ID [--base emoji] [--dataset runs/emoji/data] [--count 200]

Takes evenly spaced rows of the test split and enlarges three sets of small images, image i with the seed i:

- reduced: the rows' images, reduced to the size of the base;
- redrawn: these, encoded and decoded by the base's image tokenizer, if it has one: what the base could draw at best;
- drawn: what the base draws for the rows' captions.

PSNR, SSIM and LPIPS compare with the rows' images, so that "drawn" has none; LPIPS needs the weights of VGG16. Both
distances are Frechet distances from the rows' images in the features of the scoreboard's network, see
benchmarks/scoreboard.py. That network sees 64 pixels. Whole images are reduced to that, which hides nearly all that
enlargement can add. Windows are squares of 64 pixels of the enlarged images, side by side, and show it.

The last line before the JSON is the rule by which an upsampler ships: with its own number of steps, for each of the
sets, the distance of windows, and LPIPS where there is one, are below those of bicubic enlargement.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date

import diffusers
import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from scoreboard import BATCH_SIZE, Judge, commit, evenly, load_judge, to_array, to_tensor

from llamagen_hf import PixelDiffusionPipeline
from llamagen_hf.data.source import DataConfig
from llamagen_hf.diffusion.schedules import enlarge
from llamagen_hf.diffusion.training.small_images import SmallImages
from llamagen_hf.evaluation import frechet_distance
from llamagen_hf.evaluation.reconstruction import PerceptualLoss
from llamagen_hf.evaluation.sampling import SamplingConfig, sample_images
from llamagen_hf.evaluation.upsampling import Enlarged, evaluate_upsampling
from llamagen_hf.families import load_pipeline
from llamagen_hf.local_paths import public_name


BICUBIC = "bicubic"
COLUMNS = (  # heading, key and format
    ("s/image", "seconds", ".3f"),
    ("PSNR", "psnr", ".2f"),
    ("SSIM", "ssim", ".3f"),
    ("LPIPS", "lpips", ".3f"),
    ("distance", "distance", ".2f"),
    ("distance of windows", "window_distance", ".2f"),
)


def windows(images: np.ndarray, side: int) -> np.ndarray:
    """Images `(n, height, width, 3)` in squares `(m, side, side, 3)`, without what is left at the right and below."""
    rows, columns = images.shape[1] // side, images.shape[2] // side
    images = images[:, : rows * side, : columns * side].reshape(len(images), rows, side, columns, side, 3)
    return images.swapaxes(2, 3).reshape(-1, side, side, 3)


def small_sets(
    base: DiffusionPipeline, rows: Dataset, large: torch.Tensor, small_images: SmallImages
) -> dict[str, torch.Tensor]:
    """The small images `(n, 3, h, w)` in [-1, 1] of each set, by its name."""
    sets = {"reduced": small_images.reduce(large)}
    if small_images.vq_model is not None:
        sets["redrawn"] = torch.cat([small_images.redraw(batch) for batch in sets["reduced"].split(BATCH_SIZE)])
    with tempfile.TemporaryDirectory() as folder:
        config = SamplingConfig(len(rows), prompts=list(rows["caption"]), batch_size=BATCH_SIZE)
        sets["drawn"] = to_tensor(sample_images(base, config, folder), base.image_size)
    return sets


def upsample(upsampler: PixelDiffusionPipeline, small: torch.Tensor, captions: list[str], **settings) -> torch.Tensor:
    """Small images `(n, 3, h, w)` in [-1, 1], enlarged: `(n, 3, height, width)`."""
    batches = []
    for start in range(0, len(small), BATCH_SIZE):
        batch = small[start : start + BATCH_SIZE]
        if upsampler.reads_text:
            settings["prompt"] = captions[start : start + BATCH_SIZE]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        batches.append(upsampler.draw_pixels(image=(batch + 1) / 2, generator=generators, **settings))
    return torch.cat(batches)


def measure_seconds(upsampler: PixelDiffusionPipeline, image: torch.Tensor, caption: str, calls: dict, repeats: int):
    """Median seconds to enlarge one image `(1, 3, h, w)`, by name of the call; calls take turns."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):  # the first is to warm up
        for name, settings in calls.items():
            start = time.perf_counter()
            if name == BICUBIC:
                enlarge(image, upsampler.image_size)
            else:
                upsample(upsampler, image, [caption], **settings)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(
    base: DiffusionPipeline,
    upsampler: PixelDiffusionPipeline,
    small_images: SmallImages,
    judge: Judge,
    rows: Dataset,
    step_counts: list[int],
    perceptual_loss: PerceptualLoss | None = None,
    aug_level: float | None = None,
    repeats: int = 5,
) -> dict:
    """Everything the benchmark shows.

    Args:
        base ([`~diffusers.DiffusionPipeline`]): Draws small images from captions.
        upsampler ([`PixelDiffusionPipeline`]): Enlarges them.
        small_images ([`~llamagen_hf.diffusion.training.small_images.SmallImages`]): Makes those of real images.
        judge ([`Judge`]): Measures distances.
        rows (`datasets.Dataset`): Large images, with captions.
        step_counts (`list[int]`): Numbers of steps to try, beside the checkpoint's own.
        perceptual_loss ([`~llamagen_hf.evaluation.reconstruction.PerceptualLoss`], *optional*): Adds LPIPS.
        aug_level (`float`, *optional*): Noise in the small images; by default the checkpoint's.
        repeats (`int`, *optional*, defaults to 5): Times that each call is timed.

    Returns:
        `dict`: `sets`, by set and call the scores; `steps`, the checkpoint's own number of steps; `ships`, whether
        the upsampler passes the rule.
    """
    size = upsampler.image_size
    side = min(judge.model.config.image_size, size)
    captions, large = list(rows["caption"]), to_tensor(rows, size)
    sets = small_sets(base, rows, large, small_images)

    def look(images: torch.Tensor) -> dict[str, torch.Tensor]:
        array = to_array(images)
        return {"distance": judge.look_at(array), "window_distance": judge.look_at(windows(array, side))}

    reference = look(large)
    own = upsampler.sampling_settings()["num_inference_steps"]
    calls = {
        f"{steps} steps": {"num_inference_steps": steps, "aug_level": aug_level}
        for steps in sorted({own, *step_counts})
    }
    calls = {BICUBIC: {}} | calls
    seconds = measure_seconds(upsampler, sets["reduced"][:1], captions[0], calls, repeats)
    results = {}
    for name, small in sets.items():
        results[name] = {}
        for call, settings in calls.items():
            is_bicubic = call == BICUBIC
            sample = enlarge(small, size) if is_bicubic else upsample(upsampler, small, captions, **settings)
            scores = {"seconds": seconds[call]}
            if name != "drawn":
                parts = (part.split(BATCH_SIZE) for part in (small, sample, large))
                batches = (Enlarged(*part) for part in zip(*parts, strict=True))
                scores |= evaluate_upsampling(batches, sample.device, perceptual_loss)
            scores |= {key: frechet_distance(reference[key], features) for key, features in look(sample).items()}
            results[name][call] = {key: value for key, value in scores.items() if not key.endswith("_bicubic")}
    return {"sets": results, "steps": own, "ships": ships(results, f"{own} steps")}


def ships(sets: dict[str, dict[str, dict[str, float]]], call: str) -> bool:
    """Whether a call is better than bicubic enlargement for each set, as on top of this file."""
    return all(
        calls[call][key] < calls[BICUBIC][key]
        for calls in sets.values()
        for key in ("window_distance", "lpips")
        if key in calls[BICUBIC]
    )


def show(results: dict) -> str:
    """The results as a Markdown table, without the columns that were not measured, and the verdict below."""
    columns = [column for column in COLUMNS if column[1] in results["sets"]["reduced"][BICUBIC]]
    lines = [
        f"| small images | enlarged by | {' | '.join(heading for heading, _, _ in columns)} |",
        "|---|---" + len(columns) * "|---:" + "|",
    ]
    for name, calls in results["sets"].items():
        for call, scores in calls.items():
            cells = [format(scores[key], form) if key in scores else "" for _, key, form in columns]
            lines.append(f"| {name} | {call} | {' | '.join(cells)} |")
    verdict = "ships" if results["ships"] else "does not ship"
    return "\n".join([*lines, "", f"By the rule, it {verdict} with {results['steps']} steps."])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emoji", help="Folder or Hub id of a pipeline that takes prompts.")
    parser.add_argument("--upsampler", required=True, help="Folder or Hub id of an upsampler.")
    parser.add_argument("--dataset", default="runs/emoji/data", help="The emoji, as split_emoji.py wrote them.")
    parser.add_argument("--count", type=int, default=200, help="Images of each set.")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20], help="Steps, beside its own.")
    parser.add_argument("--aug_level", type=float, help="Noise in small images; by default the checkpoint's.")
    parser.add_argument("--dtype", default="float32", help="Of the upsampler, such as bfloat16.")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    base = load_pipeline(args.base)
    upsampler = PixelDiffusionPipeline.from_pretrained(args.upsampler, dtype=getattr(torch, args.dtype))
    upsampler.set_progress_bar_config(disable=True)
    if base.condition_kind != "text":
        parser.error(f"{args.base} takes no prompts, and the benchmark draws from captions")
    if not upsampler.upsamples:
        parser.error(f"{args.upsampler} draws images from noise alone; expected an upsampler")
    if base.image_size >= upsampler.image_size or upsampler.image_size % base.image_size:
        parser.error(f"the base draws {base.image_size} pixels, but the upsampler makes {upsampler.image_size}")
    try:
        rows = DataConfig(args.dataset).load("test")
    except ValueError as error:
        parser.error(str(error))
    if not 4 <= args.count <= len(rows):
        parser.error(f"--count is {args.count}; expected 4 to {len(rows)}, the size of the test split")
    try:
        perceptual_loss = PerceptualLoss.from_pretrained()
    except OSError as error:
        print(f"{error} LPIPS is left out.\n")
        perceptual_loss = None
    vq_model = args.base if "vq_model" in base.components else None
    small_images = SmallImages(base.image_size, upsampler.image_size, vq_model)
    results = measure(
        base,
        upsampler,
        small_images,
        load_judge({}),
        evenly(rows, args.count),
        args.steps,
        perceptual_loss,
        args.aug_level,
    )
    settings = upsampler.sampling_settings(aug_level=args.aug_level)
    print(
        f"## {date.today()}, {public_name(args.upsampler)} on {public_name(args.base)} at {commit()}\n\n"
        f"torch {torch.__version__}, diffusers {diffusers.__version__}; {base.image_size} to {upsampler.image_size} "
        f"pixels, {args.count} images of each set, level {settings['aug_level']}, {args.dtype}; "
        f"{(time.perf_counter() - start) / 60:.1f} minutes with {torch.get_num_threads()} threads "
        f"({platform.machine()}).\n\n{show(results)}\n\n{json.dumps(results)}"
    )


if __name__ == "__main__":
    main()
