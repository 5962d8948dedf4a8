"""Previews of images whose codes are not all generated yet."""

import torch

from .vq_model import LlamaGenVQModel


UNDRAWN = 0.86  # light grey, in the pixels' range of [-1, 1]


def decode_partly(vq_model: LlamaGenVQModel, codes: torch.LongTensor, grid_size: int) -> torch.Tensor:
    """Decode the first codes of images and paint the other cells grey.

    The decoder sees the mean codebook vector in cells without a code. It also looks at neighbouring cells, so finished
    cells still change a little as their neighbours get codes.

    Args:
        vq_model ([`LlamaGenVQModel`]): The image tokenizer.
        codes (`torch.LongTensor` of shape `(batch, n)`): The codes so far, in raster order.
        grid_size (`int`): Side of the whole grid.

    Returns:
        `torch.Tensor` of shape `(batch, channels, height, width)`: Pixels, nominally in [-1, 1].
    """
    batch, num_drawn = codes.shape
    lookup, factor = vq_model.lookup, vq_model.downsample_factor
    mean = lookup(torch.arange(vq_model.config.num_vq_embeddings, device=codes.device)).mean(0)
    latents = mean.repeat(batch, grid_size * grid_size, 1)
    latents[:, :num_drawn] = lookup(codes)
    images = vq_model.decode(latents.transpose(1, 2).unflatten(2, (grid_size, grid_size)).contiguous()).sample
    undrawn = torch.arange(grid_size * grid_size, device=codes.device).view(grid_size, grid_size) >= num_drawn
    undrawn = undrawn.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    return images.masked_fill(undrawn, UNDRAWN)
