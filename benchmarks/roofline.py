"""What a decoding step could take on this device, what it takes, and where the time goes.

python benchmarks/roofline.py --sizes emoji B L XL --batch 1 8 --dtype bfloat16 [--device cuda] [--compiled]

A step reads all matrices and the cache once, and multiplies each weight once for each row. Its bound is the longer of
two times: bytes at the bandwidth of copies larger than any cache, and FLOPs at the rate of a large matrix product,
both measured in the same process; so for matrices and for attention, whose bounds add up. The table has the bound, the
median step, and their ratio: the share reached. Below it, the time of the operators, by torch's profiler. `emoji` is
the shipped checkpoint, the others have random weights and a 16x16 grid. `--clock cpu` counts CPU time, for one thread
on a busy machine. The profiler reads the clock, so its shares need a quiet machine or many steps.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from decode import copy_bandwidth, synchronize
from torch.profiler import ProfilerActivity, profile

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenConfig, LlamaGenForConditionalGeneration
from llamagen_hf.llamagen.conversion import VARIANTS
from llamagen_hf.llamagen.decoding import CodeDecoder


GUIDANCE = 4.0
# Parts of the names of operators and kernels, by the part of a step that they belong to; the first that fits counts.
KINDS = {
    "attention": ("attention", "flash", "bmm", "fmha"),
    "matrices": ("mm", "linear", "gemm", "cutlass", "nvjet", "packed"),
    "sampling": ("sort", "topk", "cumsum", "softmax", "searchsorted", "argmax"),
}


@dataclass
class Work:
    """Bytes to read and FLOPs to do, of one step."""

    bytes: int
    flops: int

    def bound(self, bandwidth: float, rate: float) -> float:
        """Seconds that it takes at least."""
        return max(self.bytes / bandwidth, self.flops / rate)


def step_work(model: LlamaGenForConditionalGeneration, batch: int) -> dict[str, Work]:
    """The work of the matrices and of attention, over the whole cache, as the static shapes have it."""
    config, size = model.config, model.lm_head.weight.element_size()
    rows, length = 2 * batch, -(-(config.condition_length + config.num_codes) // 8) * 8
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    if model.model.text_projector is not None:  # reads the condition, once for an image
        matrices -= sum(p.numel() for p in model.model.text_projector.parameters())
    cached = config.num_hidden_layers * rows * length * config.head_dim
    return {
        "matrices": Work(matrices * size, 2 * rows * matrices),
        "attention": Work(
            2 * cached * config.num_key_value_heads * size, 4 * cached * config.num_attention_heads
        ),
    }  # fmt: skip


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """FLOPs a second of a product of two square matrices, the best of five."""
    side = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        synchronize(device)
        start = clock()
        left @ right
        synchronize(device)
        times.append(clock() - start)
    return 2 * side**3 / min(times[1:])


def load(size: str, dtype: torch.dtype, device: torch.device) -> LlamaGenForConditionalGeneration:
    if size == "emoji":
        return AutoregressiveImagePipeline.from_pretrained(vq_model=None, text_encoder=None).transformer.to(
            device, dtype
        )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaGenForConditionalGeneration(LlamaGenConfig(**VARIANTS[size])).to(dtype).eval()


def start(decoder: CodeDecoder, batch: int, device: torch.device):
    """The steps of a batch of images, one for each code."""
    config = decoder.model.config
    if config.conditioning == "class":
        condition = {"class_ids": config.vocab_size + torch.arange(batch, device=device) % config.num_classes}
    else:
        shape = batch, config.condition_length, config.condition_dim
        condition = {"prompt_embeds": torch.randn(shape, device=device, dtype=decoder.model.dtype)}
    keys = torch.arange(batch, device=device)
    return decoder.stream(keys, **condition, guidance_scale=GUIDANCE)


def step_seconds(decoder: CodeDecoder, batch: int, device: torch.device, count: int, clock: Callable) -> float:
    """The median of the steps after the first two."""
    times = []
    for _ in islice(start(decoder, batch, device), count + 2):
        synchronize(device)
        times.append(clock())
    return statistics.median(b - a for a, b in zip(times[1:], times[2:], strict=False))


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), "others")


def kernels(decoder: CodeDecoder, batch: int, device: torch.device, count: int) -> list[tuple[str, float, float]]:
    """Operators, or kernels on an accelerator, by time: the name, seconds a step, and calls a step."""
    steps = start(decoder, batch, device)
    next(steps), next(steps)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in islice(steps, count):
            pass
        synchronize(device)
    steps.close()
    on = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = [(event.key, getattr(event, on) / count / 1e6, event.count / count) for event in profiler.key_averages()]
    return sorted((event for event in events if event[1] > 0), key=lambda event: -event[1])


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=["emoji", *VARIANTS], default=["emoji", "B"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true", help="compile the step")
    parser.add_argument("--num-codes", type=int, default=16, help="steps that are timed")
    parser.add_argument("--rows", type=int, default=6, help="operators in the second table")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args(args)
    if min(args.batch) < 1 or not 1 <= args.num_codes <= 60:
        parser.error("--batch must be at least 1, --num-codes from 1 to 60")
    return args


@torch.no_grad()
def main() -> None:
    args = parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    bandwidth = copy_bandwidth(device, clock)
    rate = matmul_rate(device, dtype, clock)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, {args.dtype}, copies at "
        f"{bandwidth / 1e9:.1f} GB/s, matrix products at {rate / 1e12:.3f} TFLOP/s, guidance {GUIDANCE}, {args.clock} "
        f"time, {'compiled' if args.compiled else 'eager'}\n"
    )
    print(
        "| size | batch | MB a step | GFLOP | bound ms | by | step ms | reached |\n"
        "|---|---:|---:|---:|---:|---|---:|---:|"
    )
    details = []
    for size in args.sizes:
        decoder = CodeDecoder(load(size, dtype, device))
        if args.compiled:
            decoder.compile()
        for batch in args.batch:
            parts = step_work(decoder.model, batch)
            whole = Work(sum(p.bytes for p in parts.values()), sum(p.flops for p in parts.values()))
            bound = sum(part.bound(bandwidth, rate) for part in parts.values())
            by = "bytes" if whole.bytes / bandwidth > whole.flops / rate else "FLOPs"
            seconds = step_seconds(decoder, batch, device, args.num_codes, clock)
            print(
                f"| {size} | {batch} | {whole.bytes / 1e6:.0f} | {whole.flops / 1e9:.2f} | {1e3 * bound:.2f} | {by} | "
                f"{1e3 * seconds:.2f} | {bound / seconds:.0%} |",
                flush=True,
            )
            details.append((size, batch, parts, kernels(decoder, batch, device, args.num_codes)))
        del decoder
        gc.collect()
    for size, batch, parts, found in details:
        total = sum(seconds for _, seconds, _ in found)
        print(f"\n{size}, batch {batch}\n\n| operator | share | calls a step |\n|---|---:|---:|")
        for name, seconds, calls in found[: args.rows]:
            print(f"| `{name[:60]}` | {seconds / total:.0%} | {calls:.0f} |")
        print("\n| part | share | share of the bound |\n|---|---:|---:|")
        bounds = {kind: part.bound(bandwidth, rate) for kind, part in parts.items()}
        for kind in ("matrices", "attention", "sampling", "others"):
            share = sum(seconds for name, seconds, _ in found if kind_of(name) == kind) / total
            own = f"{bounds[kind] / sum(bounds.values()):.0%}" if kind in bounds else "-"
            print(f"| {kind} | {share:.0%} | {own} |")


if __name__ == "__main__":
    main()
