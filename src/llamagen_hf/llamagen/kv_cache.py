"""A static cache whose rows are at different positions: one slot for each stream of each image."""

from copy import copy

import torch
from transformers.cache_utils import Cache, StaticLayer

from .configuration import LlamaGenConfig


def cache_length(config: LlamaGenConfig) -> int:
    """Positions of a cache for a whole image and its condition."""
    return -(-config.max_position_embeddings // 8) * 8  # attention kernels are faster at multiples of 8


class SlotLayer(StaticLayer):
    """Keys and values of one layer. Each row's are written from its own place on.

    Args:
        max_cache_len (`int`): Positions of a slot.
        positions (`torch.LongTensor` of shape `(slots,)`): Where each row writes from, the same for all layers.
    """

    def __init__(self, max_cache_len: int, positions: torch.LongTensor):
        super().__init__(max_cache_len)
        self.positions = positions

    def update(self, key_states, value_states, *args, **kwargs):
        rows = len(key_states)
        keys, values = self.keys[:rows], self.values[:rows]
        places = self.positions[:rows, None] + torch.arange(key_states.shape[2], device=self.positions.device)
        places = places[:, None, :, None]
        keys.scatter_(2, places.expand_as(key_states), key_states)
        values.scatter_(2, places.expand_as(value_states), value_states)
        return keys, values

    def get_seq_length(self) -> int:
        # Rows differ in length. With the largest, the causal part of the mask hides nothing, and the attention mask
        # alone decides what a row sees.
        return self.max_cache_len - 1


class SlotCache(Cache):
    """Slots of fixed size, of which the first ones are in use.

    A step runs over the first rows, without gathering them, so the caller who frees a slot moves the last one there.

    Args:
        config ([`LlamaGenConfig`]): The generator's configuration.
        slots (`int`): Number of rows.
        dtype (`torch.dtype`): Type of keys and values.
        device (`torch.device`): Their device.

    Attributes:
        length (`int`): Positions of a slot.
        positions (`torch.LongTensor` of shape `(slots,)`): Where each row writes from.
        visible (`torch.BoolTensor` of shape `(slots, length)`): False for the padding of a row's condition.
    """

    def __init__(self, config: LlamaGenConfig, slots: int, dtype: torch.dtype, device: torch.device):
        self.length = cache_length(config)
        self.positions = torch.zeros(slots, dtype=torch.long, device=device)
        self.visible = torch.ones(slots, self.length, dtype=torch.bool, device=device)
        super().__init__(layers=[SlotLayer(self.length, self.positions) for _ in range(config.num_hidden_layers)])
        like = torch.empty(slots, config.num_key_value_heads, 1, config.head_dim, dtype=dtype, device=device)
        for layer in self.layers:
            layer.lazy_initialization(like, like)
        for tensor in (self.positions, self.visible):  # as the layers do: CUDA graphs read them where they are
            torch._dynamo.mark_static_address(tensor)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it holds: positions, visible, then the keys and the values of each layer."""
        return [self.positions, self.visible, *(t for layer in self.layers for t in (layer.keys, layer.values))]

    def around(self, positions: torch.Tensor, visible: torch.Tensor, *states: torch.Tensor) -> "SlotCache":
        """The same cache with other [`tensors`], which it writes to."""
        cache = copy(self)
        cache.positions, cache.visible, cache.layers = positions, visible, [copy(layer) for layer in self.layers]
        for layer, keys, values in zip(cache.layers, states[::2], states[1::2], strict=True):
            layer.positions, layer.keys, layer.values = positions, keys, values
        return cache

    def fill(self, rows: slice, prefilled: Cache, condition_mask: torch.Tensor | None) -> None:
        """Copy the keys and values of conditions, and of the codes after them, into slots.

        Args:
            rows (`slice`): The slots.
            prefilled ([`~transformers.Cache`]): What the model has read, a row for each slot.
            condition_mask (`torch.Tensor` of shape `(rows, condition_length)`, *optional*): 0 for padding.
        """
        count = prefilled.get_seq_length()
        for layer, source in zip(self.layers, prefilled.layers, strict=True):
            for slots, states in ((layer.keys, source.keys), (layer.values, source.values)):
                slots[rows, :, :count] = states
                # Attention weighs hidden values with 0, which leaves infinities and NaN as they are.
                slots[rows, :, count:] = 0
        self.visible[rows] = True
        if condition_mask is not None:
            self.visible[rows, : condition_mask.shape[1]] = condition_mask.bool()

    def window(self, rows: int, width: int) -> tuple[torch.LongTensor, torch.Tensor]:
        """Positions `(rows, width)` from where each of the first rows writes next, and the mask of what they see.

        The mask `(rows, 1, width, length)` is added to attention scores: 0, or the least number of the dtype.
        """
        places = torch.arange(self.length, device=self.positions.device)
        positions = self.positions[:rows, None] + places[:width]
        sees = self.visible[:rows, None, None] & (places <= positions[:, None, :, None])
        dtype = self.layers[0].keys.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
        return positions, mask.masked_fill(~sees, torch.finfo(dtype).min)

    def move(self, source: int, target: int) -> None:
        """Copy one slot to another."""
        for layer in self.layers:
            layer.keys[target] = layer.keys[source]
            layer.values[target] = layer.values[source]
        self.visible[target] = self.visible[source]
