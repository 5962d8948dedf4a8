"""What finer grids of codes would keep of the emoji: the tokenizer's reconstructions at several image sizes, judged.

python benchmarks/grids.py [--checkpoint emoji] [--sizes 64 96 128] [--dataset runs/emoji/data] [--count 419]

The tokenizer makes one code of a square of pixels, so a larger image has more codes of the same kind. Its
reconstructions bound what a generator of them can reach. Evenly spaced images of each split are reconstructed at each
size and judged as benchmarks/scoreboard.py judges. PSNR is given at the size itself, and reduced to the smallest size,
where all of them can be compared.
"""

import argparse

import torch
import torch.nn.functional as F
from datasets import Dataset
from scoreboard import SPLITS, Judge, evenly, load_judge, to_array, to_tensor

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenVQModel
from llamagen_hf.data.source import DataConfig
from llamagen_hf.evaluation.reconstruction import psnr


@torch.no_grad()
def measure(vq_model: LlamaGenVQModel, judge: Judge, rows: Dataset, size: int, smallest: int) -> dict[str, float]:
    """The scores of reconstructions at a size, with `psnr`, and `psnr_reduced` at the smallest size."""
    originals, small = to_tensor(rows, size), to_tensor(rows, smallest)
    images = torch.cat([vq_model(batch).sample.clamp(-1, 1) for batch in originals.split(64)])
    reduced = images
    if size != smallest:
        reduced = F.interpolate(images, small.shape[-2:], mode="bicubic", antialias=True).clamp(-1, 1)
    scores = judge.score(to_array(images), rows)
    for name, pair in (("psnr", (images, originals)), ("psnr_reduced", (reduced, small))):
        scores[name] = psnr(*((each + 1) / 2 for each in pair)).mean().item()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="emoji", help="Folder or Hub id of a pipeline.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128], help="Sides of the images, in pixels.")
    parser.add_argument("--dataset", default="runs/emoji/data", help="The emoji, as split_emoji.py wrote them.")
    parser.add_argument("--count", type=int, default=419, help="Images of each split.")
    args = parser.parse_args()
    vq_model = AutoregressiveImagePipeline.from_pretrained(args.checkpoint, transformer=None).vq_model
    if wrong := [size for size in args.sizes if size % vq_model.downsample_factor]:
        parser.error(f"--sizes has {wrong[0]}; expected multiples of {vq_model.downsample_factor}, a code's pixels")
    splits = {split: DataConfig(args.dataset).load(split) for split in SPLITS}
    judge = load_judge(splits)
    print("| split | size | codes | PSNR, dB | PSNR reduced, dB | distance | subgroup | style | R-precision |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for split, rows in splits.items():
        chosen = evenly(rows, min(args.count, len(rows)))
        for size in args.sizes:
            scores = measure(vq_model, judge, chosen, size, min(args.sizes))
            values = [f"{scores[name]:.2f}" for name in ("psnr", "psnr_reduced", f"distance_to_{split}")]
            values += [f"{scores[name]:.1%}" for name in ("subgroup_accuracy", "style_accuracy", "r_precision")]
            grid = size // vq_model.downsample_factor
            print(f"| {split} | {size} | {grid}x{grid} | {' | '.join(values)} |", flush=True)


if __name__ == "__main__":
    main()
