"""Which dtype computes fastest, for `dtype="auto"`."""

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CPU has instructions for bfloat16. Without them it is emulated, and slower than float32."""
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device | None = None) -> torch.dtype:
    """The dtype that a name stands for.

    Args:
        dtype (`str` or `torch.dtype`):
            The name of one, or `"auto"` for the fastest: bfloat16 on accelerators and on CPUs with instructions for
            it, float32 on others.
        device (`str` or `torch.device`, *optional*):
            Where the model will run; by default an accelerator if there is one, else the CPU.

    Raises:
        ValueError: If there is no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if not isinstance(found, torch.dtype):
            raise ValueError(f"The dtype is {dtype!r}; expected a torch.dtype, the name of one, or 'auto'.")
        return found
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(device)
    return torch.bfloat16 if device.type != "cpu" or has_bfloat16(device) else torch.float32
