"""Pictures of which only a part is drawn."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .vq_model import LlamaGenVQModel


UNDRAWN = 0.86  # light grey, in the pixels' range of [-1, 1]
PREVIEW_SHARE = 0.1  # of the time of a drawing that previews may take, where nobody asks for more


def decode_partly(vq_model: LlamaGenVQModel, codes: torch.LongTensor, grid_size: int) -> torch.Tensor:
    """Decode the first codes of pictures; the rest is grey.

    The decoder sees the mean codebook vector where nothing is drawn. It looks beyond single codes, so what is drawn
    changes a little with what comes.

    Args:
        vq_model ([`LlamaGenVQModel`]): The tokenizer.
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


class PreviewSchedule:
    """Says when a preview is due, and measures what previews cost.

    Args:
        every (`int`, *optional*): Codes from one to the next. By default a row of codes, but none that would take the
            previews' share of the time so far beyond [`PREVIEW_SHARE`], judging by the last.
        grid_size (`int`): Side of the grid.
    """

    def __init__(self, every: int | None, grid_size: int):
        self.every = every or grid_size
        self.is_thrifty = every is None
        self.start = time.perf_counter()
        self.spent = 0.0
        self.last = 0.0

    def is_due(self, num_drawn: int) -> bool:
        """Whether to show a picture of `num_drawn` codes."""
        if num_drawn % self.every:
            return False
        drawing = time.perf_counter() - self.start - self.spent
        return not self.is_thrifty or self.spent + self.last <= PREVIEW_SHARE * drawing

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Wraps the making of a preview."""
        start = time.perf_counter()
        yield
        self.last = time.perf_counter() - start
        self.spent += self.last
