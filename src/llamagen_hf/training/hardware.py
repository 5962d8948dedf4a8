"""What this machine can do: its fast precision, whether it can compile, its peak arithmetic, its memory in use."""

import psutil
import torch

from ..loading.compilation import missing_for_cpu
from ..loading.precision import has_bfloat16


# Dense bfloat16 FLOP/s of the makers' data sheets, by a part of the device's name, special names first.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of an accelerator; `None` for devices that are not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def fast_precision(device: torch.device) -> str | None:
    """The faster `mixed_precision` of a CPU: `"bf16"` if it has instructions for bfloat16, else `"no"`.

    Without them bfloat16 is emulated, and slower than float32. `None` for accelerators, where the launcher says.
    """
    if device.type != "cpu":
        return None
    return "bf16" if has_bfloat16(device) else "no"


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` finds what it needs for a CPU; `False` for accelerators, where it was not measured."""
    return device.type == "cpu" and missing_for_cpu() is None


def memory_in_use(device: torch.device) -> int:
    """Bytes: the memory that this process holds on a CPU, and the most that it had allocated on an accelerator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def run_sentence(device: torch.device, num_processes: int, mixed_precision: str, is_compiled: bool) -> str:
    """What computes a training, and how: one sentence for its log."""
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[mixed_precision]
    parts = [f"{num_processes} process(es) on {device.type}"]
    if device.type == "cpu":
        parts.append(f"with {torch.get_num_threads()} thread(s)")
    parts.append(f"in {precision}" if mixed_precision == "no" else f"in {precision} (mixed precision)")
    return f"Training by {' '.join(parts)}{', compiled' if is_compiled else ''}."
