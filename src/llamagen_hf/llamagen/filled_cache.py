"""A cache of fixed size that shows the layers no more of itself than is filled, for steps that are not compiled."""

import torch
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer


# A multiple of what attention kernels read at once, so that what they skip changes no bit of their sums.
BLOCK = 32


class FilledLayer(StaticLayer):
    """Keys and values of one layer: stored at fixed places, shown up to the last one in use, rounded up to a block."""

    def _shown(self, new: int) -> int:
        used = (int(self.cumulative_length) if self.is_initialized else 0) + new
        return min(-(-used // BLOCK) * BLOCK, self.max_cache_len)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values; all keys and values so far, each of shape `(batch, heads, shown, head_dim)`."""
        shown = self._shown(key_states.shape[-2])
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[:, :, :shown], values[:, :, :shown]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what the next [`update`] shows, for the attention mask."""
        return self._shown(query_length), 0


class FilledCache(StaticCache):
    """A [`~transformers.StaticCache`] of [`FilledLayer`]: attention reads half as much of it over a whole image.

    The length is read on the host, so this is for CPUs, and it varies, so it is for steps that are not compiled.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Gives the number of layers.
        max_cache_len (`int`): Positions to allocate.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int):
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.layers = [FilledLayer(max_cache_len=max_cache_len) for _ in self.layers]
