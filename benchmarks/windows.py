"""What decoding windows bring: steps and seconds for the codes of an image, beside one code a step.

python benchmarks/windows.py [--images 48] [--batches 1 8] [--compile]
python benchmarks/windows.py --sizes B L --images 2

Draws captions of its list with the emoji checkpoint, in turns with each window, and counts the images whose codes
differ from those of one code a step. `--sizes` takes random weights, whose step takes the time of trained ones; how
many steps they need says nothing about trained ones.
"""

import argparse
import platform
import statistics
import time

import torch

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenConfig, LlamaGenForConditionalGeneration
from llamagen_hf.llamagen.conversion import VARIANTS
from llamagen_hf.llamagen.decoding import CodeDecoder


PROMPTS = (
    "a red apple, a cat, flag: france, grinning face, a blue heart, a house, a tree, soccer ball, hot dog, rainbow, "
    "red car, wolf, pizza, umbrella, crescent moon, a bee"
).split(", ")


class Bench:
    """A model, its conditions and its settings."""

    def __init__(self, size: str | None, args: argparse.Namespace):
        torch.manual_seed(0)
        self.dtype = getattr(torch, args.dtype)
        if size is None:
            pipe = AutoregressiveImagePipeline.from_pretrained(args.checkpoint, dtype=self.dtype).to(args.device)
            states, masks = pipe.encode_prompt([PROMPTS[i % len(PROMPTS)] for i in range(args.images)])
            self.model, self.settings = pipe.transformer, pipe.sampling_settings()
            self.condition = {"prompt_embeds": states.to(self.dtype), "prompt_attention_mask": masks}
        else:
            with torch.device(args.device):
                model = LlamaGenForConditionalGeneration(LlamaGenConfig(**VARIANTS[size], grid_size=args.grid_size))
                self.condition = {"class_ids": model.config.vocab_size + torch.arange(args.images)}
            self.model, self.settings = model.to(self.dtype).eval(), {"guidance_scale": 4.0}
        self.decoder = CodeDecoder(self.model)
        if args.compile:
            self.decoder.compile()
        self.steps = 0
        for name in ("_step", "_window_step"):
            setattr(self.decoder, name, self._counted(getattr(self.decoder, name)))

    def _counted(self, step):
        def counted(*args):
            self.steps += 1
            return step(*args)

        return counted

    def draw(self, rows: slice, window: int) -> tuple[torch.LongTensor, int, float]:
        """Codes of some of the images, with the steps and seconds that they took."""
        condition = {name: value[rows] for name, value in self.condition.items()}
        device = next(iter(condition.values())).device
        keys = torch.arange(rows.start, rows.stop, device=device)
        self.steps, start = 0, time.perf_counter()
        codes = self.decoder(keys, **condition, **self.settings, decoding_window=window)
        codes = codes.cpu()  # waits for the device
        return codes, self.steps, time.perf_counter() - start


def measure(bench: Bench, args: argparse.Namespace, batch: int) -> None:
    """Draw all images in batches with each window in turns, and print a row for each window."""
    rows = [slice(start, start + batch) for start in range(0, args.images, batch)]
    steps = {window: [] for window in args.windows}
    seconds, other = {window: [] for window in args.windows}, dict.fromkeys(args.windows, 0)
    for window in args.windows:
        bench.draw(rows[0], window)  # allocates and compiles
    for each in rows:
        expected = None
        for window in args.windows:
            codes, count, time_taken = bench.draw(each, window)
            expected = codes if expected is None else expected
            steps[window].append(count)
            seconds[window].append(time_taken)
            other[window] += int((codes != expected).any(1).sum())
    first = args.windows[0]
    for window in args.windows:
        fewer = sum(steps[first]) / sum(steps[window])
        faster = statistics.median(a / b for a, b in zip(seconds[first], seconds[window], strict=True))
        print(
            f"{batch:5} {window:6} {statistics.mean(steps[window]):7.1f} {fewer:5.2f}x "
            f"{statistics.median(seconds[window]):8.3f} {faster:5.2f}x {other[window]:4} of {args.images}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a text-conditional one; the emoji that ship by default")
    parser.add_argument("--sizes", nargs="+", choices=list(VARIANTS), help="random weights of these sizes instead")
    parser.add_argument("--grid-size", type=int, default=16, help="of random weights")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.windows[0] != 1 or any(args.images % batch for batch in args.batches):
        parser.error("--windows must begin with 1, and --images must be a multiple of each of --batches")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for size in args.sizes or [None]:
        print(f"{size or args.checkpoint or 'emoji'}, {args.dtype}{', compiled' if args.compile else ''}")
        print("batch window   steps  fewer  seconds faster  images with other codes")
        bench = Bench(size, args)
        for batch in args.batches:
            measure(bench, args, batch)


if __name__ == "__main__":
    main()
