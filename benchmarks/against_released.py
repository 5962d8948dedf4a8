"""A race against the released code: the same weights, side by side in one process.

python benchmarks/against_released.py --released DIR --parts codes vq [--size B] [--batch 1 8 16] [--device cuda]
python benchmarks/against_released.py --released DIR --parts train --train-batch 8

DIR is a checkout of FoundationVision/LlamaGen, of which benchmarks/released.py says how it is run.

- codes: seconds of a code, and of a whole image: the first code, 255 others at the median time of a code, and the
  tokenizer's decoder, each by itself. Guidance 4, temperature 1 and top-k 2,000, as in the released scripts. Before
  that, both sides draw their likeliest codes, which must be equal in float32; for other dtypes the share is printed.
- vq: seconds of encoding and of decoding images of 256 px by VQ-16.
- train: seconds of a step: forward, loss, backward, clipping, AdamW. Ours is the trainer's, its loader included.

Variants take turns within each repeat, so that whatever else the machine does hits all of them; medians are reported.
`--clock cpu` counts this process's CPU time in place of the time on the clock: with one thread (OMP_NUM_THREADS=1) it
is what the step would take on a core of its own, apart from caches and bandwidth that other processes use up.
"""

import argparse
import copy
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from released import Released, ReleasedTraining

from llamagen_hf.llamagen.conversion import transformer_from_released, vq_model_from_released
from llamagen_hf.llamagen.decoding import CodeDecoder


GRID = 16
SAMPLING = {"temperature": 1.0, "top_k": 2000, "top_p": 1.0}
GUIDANCE = 4.0


@dataclass(frozen=True)
class Variant:
    """A way to run one of the two sides; `stream` are further arguments of [`CodeDecoder.stream`]."""

    side: str
    dtype: str = "float32"
    compiled: bool = False
    stream: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        extra = [f"{name} {value}" for name, value in self.stream]
        return ", ".join([self.side, self.dtype, "compiled" if self.compiled else "eager", *extra])


VARIANTS = [
    Variant(side, dtype, compiled)
    for dtype in ("float32", "bfloat16")
    for compiled in (False, True)
    for side in ("released", "ours")
]


class Generators:
    """The two generators with the same weights, in each dtype and compiled where a variant asks for it."""

    def __init__(self, released: Released, size: str, variants: list[Variant], device: torch.device):
        torch.manual_seed(0)
        self.released, self.device = released, device
        theirs = released.generator(size, GRID)
        ours = transformer_from_released(theirs.state_dict(), size, GRID)
        self.models, copies = {}, {}
        for variant in variants:
            key = variant.side, variant.dtype
            if key not in copies:
                source = theirs if variant.side == "released" else ours
                copies[key] = copy.deepcopy(source).to(device, getattr(torch, variant.dtype))
            self.models[variant] = copies[key]
            if variant.side == "ours":
                self.models[variant] = CodeDecoder(copies[key])
            if variant.compiled and variant.side == "ours":
                self.models[variant].compile()
            elif variant.compiled:
                self.models[variant] = torch.compile(copies[key], mode="reduce-overhead", fullgraph=True)

    def draw(self, variant: Variant, batch: int, limit: int, greedy: bool = False) -> list[tuple]:
        """The first `limit` of 256 codes of each image: for each the clocks' times and the codes `(batch,)`."""
        classes = torch.arange(batch, device=self.device)
        model, start = self.models[variant], (time.perf_counter(), time.process_time(), None)
        if variant.side == "released":
            settings = {**SAMPLING, "cfg_scale": GUIDANCE}
            return [start, *self.released.codes(model, classes, GRID**2, limit, greedy, **settings)]
        settings = {**SAMPLING, "guidance_scale": GUIDANCE, **dict(variant.stream)}
        settings |= {"temperature": 0.0} if greedy else {}
        keys = torch.arange(batch, device=self.device)
        start, drawn = (time.perf_counter(), time.process_time(), None), []
        stream = model.stream(keys, class_ids=model.model.config.vocab_size + classes, **settings)
        for codes in stream:
            drawn.append((time.perf_counter(), time.process_time(), codes[:, -1].clone()))
            if len(drawn) == limit:
                break
        stream.close()
        return [start, *drawn]


class Clock:
    """Seconds on the clock, or of this process's CPU time."""

    def __init__(self, name: str, device: torch.device):
        self.place, self.device = ("wall", "cpu").index(name), device
        self.now = (time.perf_counter, time.process_time)[self.place]

    def seconds(self, function: Callable) -> float:
        self.synchronize()
        start = self.now()
        function()
        self.synchronize()
        return self.now() - start

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def rounds(functions: dict, repeats: int) -> dict[object, list]:
    """What each function returns, `repeats` times in turns, after a call that warms up and compiles."""
    for function in functions.values():
        function()
    results = {key: [] for key in functions}
    for _ in range(repeats):
        for key, function in functions.items():
            results[key].append(function())
    return results


def vq_functions(released: Released, device: torch.device, dtypes: list[str], batch: int) -> dict[str, dict]:
    """Encoders and decoders of both sides, by variant."""
    torch.manual_seed(0)
    theirs = released.vq_model().to(device)
    images = 2 * torch.rand(batch, 3, 16 * GRID, 16 * GRID, device=device) - 1
    codes = torch.randint(16384, (batch, GRID, GRID), device=device)
    shape = [batch, 8, GRID, GRID]
    encoding, decoding = {}, {}
    for name in dtypes:
        dtype = getattr(torch, name)
        released_vq, pixels = copy.deepcopy(theirs).to(dtype), images.to(dtype)
        ours = vq_model_from_released(copy.deepcopy(theirs).state_dict()).to(dtype)
        encoding[f"released, {name}"] = lambda vq=released_vq, x=pixels: vq.encode(x)[2][2]
        decoding[f"released, {name}"] = lambda vq=released_vq: vq.decode_code(codes.flatten(), shape)
        encoding[f"ours, {name}"] = lambda vq=ours, x=pixels: vq.encode(x).codes.flatten()
        decoding[f"ours, {name}"] = lambda vq=ours: vq.decode_codes(codes)
    with torch.no_grad():
        if "float32" in dtypes:
            torch.testing.assert_close(decoding["ours, float32"](), decoding["released, float32"](), atol=1e-3, rtol=0)
            equal = encoding["ours, float32"]() == encoding["released, float32"]()
            print(f"\nVQ-16: {equal.float().mean():.1%} of the codes of noise are equal in float32.")
    return {"encode": encoding, "decode": decoding}


@torch.no_grad()
def race_vq(released: Released, clock: Clock, args: argparse.Namespace) -> dict[tuple[str, str], float]:
    """Print the seconds of encoding and decoding one image; those of decoding by side and dtype."""
    found = {}
    functions = vq_functions(released, clock.device, args.dtypes, batch=1)
    timed = {
        (part, name): (lambda f=function: clock.seconds(f))
        for part, by_name in functions.items()
        for name, function in by_name.items()
    }
    medians = {key: statistics.median(values) for key, values in rounds(timed, args.repeats).items()}
    print("\n| VQ-16, 256 px, batch 1 | encode ms | ratio | decode ms | ratio |\n|---|---:|---:|---:|---:|")
    base = {part: medians[part, f"released, {args.dtypes[0]}"] for part in functions}
    for name in functions["decode"]:
        cells = [f"{1e3 * medians[part, name]:.0f} | {base[part] / medians[part, name]:.2f}x" for part in base]
        print(f"| {name} | {' | '.join(cells)} |")
        found[tuple(name.split(", "))] = medians["decode", name]
    return found


def race_codes(released: Released, clock: Clock, decoding: dict, args: argparse.Namespace) -> None:
    variants = [v for v in VARIANTS if v.dtype in args.dtypes and (args.compiled or not v.compiled)]
    generators = Generators(released, args.size, variants, clock.device)
    print("\n| batch | variant | ms a code | ratio | s an image | ratio | likeliest codes |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for batch in args.batch:
        greedy = {v: generators.draw(v, batch, args.num_codes, greedy=True) for v in variants}
        first = torch.stack([codes for *_, codes in greedy[variants[0]][1:]])
        drawn = rounds({v: partial(generators.draw, v, batch, args.num_codes) for v in variants}, args.repeats)
        reference = None
        for variant in variants:
            codes = torch.stack([codes for *_, codes in greedy[variant][1:]])
            share = (codes == first).float().mean().item()
            if variant.dtype == "float32" and share < 1:
                raise SystemExit(f"{variant.name}: only {share:.1%} of the likeliest codes are those of the first.")
            runs = [[entry[clock.place] for entry in run] for run in drawn[variant]]
            # The first step may compile, and the released one does so in each call.
            step = statistics.median(b - a for run in runs for a, b in zip(run[2:], run[3:], strict=False))
            start = statistics.median(run[1] - run[0] for run in runs)
            image = min(start, step) + (GRID**2 - 1) * step + batch * decoding[variant.side, variant.dtype]
            reference = reference or (step, image)
            print(
                f"| {batch} | {variant.name} | {1e3 * step:.1f} | {reference[0] / step:.2f}x | {image:.1f} | "
                f"{reference[1] / image:.2f}x | {share:.0%} |",
                flush=True,
            )


def race_training(released: Released, clock: Clock, args: argparse.Namespace) -> None:
    import train  # which needs the training extra
    from accelerate.state import AcceleratorState

    print("\n| dtype | step | ms | ratio |\n|---|---|---:|---:|")
    for dtype in args.dtypes:
        AcceleratorState._reset_state()  # it keeps the precision of a process's first training
        modes = ["trainer", "trainer compiled"] if args.compiled else ["trainer"]
        words = f"--batch_size {args.train_batch} --steps {args.train_steps} --dtype {dtype}".split()
        options = train.parse_args([*words, "--device", clock.device.type, "--modes", *modes])
        with tempfile.TemporaryDirectory() as folder:
            bench = train.Bench(args.size, 0.0, options, Path(folder))
            precision = "bf16" if dtype == "bfloat16" else "no"
            sides = {}
            for compiled in [False, True][: 1 + args.compiled]:
                model = released.generator(args.size, GRID).to(clock.device)
                name = "released compiled" if compiled else "released"
                sides[name] = ReleasedTraining(model, bench.batches, precision, compiled)
            sides |= bench.sides
            timed = {
                name: (lambda side=side: clock.seconds(lambda: side.train_steps(args.train_steps)))
                for name, side in sides.items()
            }
            results = {
                name: statistics.median(t) / args.train_steps for name, t in rounds(timed, args.repeats).items()
            }
        for name, seconds in results.items():
            print(f"| {dtype} | {name} | {1e3 * seconds:.0f} | {results['released'] / seconds:.2f}x |", flush=True)


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", type=Path, required=True, help="checkout of FoundationVision/LlamaGen")
    parser.add_argument("--size", choices=["B", "L", "XL", "XXL", "XXXL", "1B", "3B"], default="B")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="+", choices=["codes", "vq", "train"], default=["codes", "vq", "train"])
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="eager variants only")
    parser.add_argument("--num-codes", type=int, default=16, help="codes of an image that are drawn and timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--train-steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args(args)
    if not 4 <= args.num_codes <= GRID**2:
        parser.error(f"--num-codes must be from 4 to {GRID**2}")
    if min(args.batch) < 1 or args.repeats < 1:
        parser.error("--batch and --repeats must be at least 1")
    if args.clock == "cpu" and (args.device != "cpu" or torch.get_num_threads() > 1):
        parser.error("--clock cpu is for one thread of a CPU: set OMP_NUM_THREADS=1")
    return args


def main() -> None:
    args = parse_args()
    os.environ["ACCELERATE_USE_CPU"] = str(args.device == "cpu")
    device = torch.device(args.device)
    released, clock = Released(args.released), Clock(args.clock, device)
    # Each released `generate` call makes new caches, for which its model is compiled anew.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, diffusers {diffusers.__version__}; {args.size}, guidance {GUIDANCE}, "
        f"{args.num_codes} codes, {args.repeats} repeats, {args.clock} time"
    )
    if {"codes", "vq"} & {*args.parts}:
        decoding = race_vq(released, clock, args)
    if "codes" in args.parts:
        race_codes(released, clock, decoding, args)
    if "train" in args.parts:
        race_training(released, clock, args)


if __name__ == "__main__":
    main()
