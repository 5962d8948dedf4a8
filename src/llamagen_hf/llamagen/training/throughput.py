"""Model FLOPs utilization: what share of a device's arithmetic a training step uses."""

import torch

from ..modeling import LlamaGenForConditionalGeneration


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


def flops_per_image(model: LlamaGenForConditionalGeneration) -> float:
    """Floating-point operations of one training sequence, forward and backward, without recomputation.

    6 for each weight that multiplies a position, and 12 times layers, width and length for its attention (PaLM, arXiv
    2204.02311, appendix B). Embeddings are looked up, not multiplied.
    """
    config = model.config
    length = config.condition_length + config.num_codes - 1
    embeddings = {"model.embed_tokens.weight", "model.uncond_embedding.weight"}
    weights = sum(p.numel() for name, p in model.named_parameters() if name not in embeddings)
    width = config.num_attention_heads * config.head_dim
    return length * (6 * weights + 12 * config.num_hidden_layers * width * length)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of an accelerator; `None` for devices that are not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
