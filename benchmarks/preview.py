"""What previews cost: `pipe.stream` beside a plain call, taking turns in one run.

python benchmarks/preview.py [--checkpoint FOLDER_OR_ID] [--count 1] [--repeats 15] [--device cuda] [--dtype bfloat16]

- call:    `pipe(...)`
- default: `pipe.stream(...)`, previews as often as they are cheap
- row:     `pipe.stream(..., preview_every=<a row of codes>)`

Medians of seconds, and their ratio to the plain call.
"""

import argparse
import statistics
import time

import torch

from llamagen_hf import AutoregressiveImagePipeline


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--checkpoint", default="emoji")
    arguments.add_argument("--prompt", default="a red apple", help="A class id for a class-conditional checkpoint.")
    arguments.add_argument("--count", type=int, default=1, help="Images drawn together.")
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32")
    args = arguments.parse_args()

    pipe = AutoregressiveImagePipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    pipe.to(args.device).set_progress_bar_config(disable=True)
    condition = {"prompt": args.prompt} if pipe.condition_kind == "text" else {"class_labels": int(args.prompt)}
    condition["num_images_per_prompt"] = args.count

    def stream(**kwargs) -> int:
        return sum(len(step.images) > 0 for step in pipe.stream(**condition, **kwargs)) - 1  # made when looked at

    modes = {
        "call": lambda: pipe(**condition) and 0,
        "default": stream,
        "row": lambda: stream(preview_every=pipe.transformer.config.grid_size),
    }
    seconds, previews = {name: [] for name in modes}, {}
    for repeat in range(args.repeats + 1):  # the first is to warm up
        for name, mode in modes.items():
            start = time.perf_counter()
            previews[name] = mode()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.device} {args.dtype}, torch {torch.__version__}, {args.count} x {pipe.image_size} px")
    for name, value in medians.items():
        print(f"{name:8}{value:8.3f} s  {value / medians['call']:6.3f}  {previews[name]} previews")


if __name__ == "__main__":
    main()
