"""Memory and time of the metrics at the size of papers: 50,000 features of width 2048 on each side.

python benchmarks/evaluation.py [--count 50000] [--width 2048] [--metrics precision_recall frechet_distance]

Each metric runs in its own process, which reports its peak memory, without that of the features. There is no other
implementation to compare with; the time is for planning.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from llamagen_hf import evaluation


def measure(metric: str, count: int, width: int) -> dict:
    torch.manual_seed(0)
    reference, samples = torch.randn(count, width).abs_(), torch.randn(count, width).abs_().mul_(1.05)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    value = getattr(evaluation, metric)(reference, samples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "value": value,
        "seconds": time.perf_counter() - start,
        "peak_gb": peak / 1e6,
        "features_gb": 2 * count * width * 4 / 1e9,
        "added_gb": (peak - before) / 1e6,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=50_000)
    arguments.add_argument("--width", type=int, default=2048)
    arguments.add_argument("--metrics", nargs="+", default=["frechet_distance", "precision_recall", "kernel_distance"])
    arguments.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    own = arguments.parse_args()
    if own.one:
        print(json.dumps(measure(own.metrics[0], own.count, own.width)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {own.count:,} features of width {own.width}")
    print("| metric | value | s | peak GB | of which features GB |\n|---|---|---:|---:|---:|")
    for metric in own.metrics:
        command = [sys.executable, __file__, "--one", "--metrics", metric]
        command += ["--count", str(own.count), "--width", str(own.width)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {metric} | {found['value']} | {found['seconds']:.0f} | {found['peak_gb']:.2f} "
            f"| {found['features_gb']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
