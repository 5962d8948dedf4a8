"""The random numbers of an image: a key, and noise for each code and place that follows from the key alone.

The noise comes from a counter-based generator, SplitMix64 (Steele, Lea and Flood 2014), so any of it can be computed
at any time, in any order and on any device.
"""

import torch


# Steele, Lea and Flood: the golden ratio, and the constants of the mixing function (Stafford's variant 13).
_STEP = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
# What the parameters of an image call this noise, by which an image that was drawn otherwise is told.
NOISE = "gumbel-splitmix64"


def draw_noise_keys(
    batch_size: int, generator: torch.Generator | list[torch.Generator] | None, device: torch.device
) -> torch.LongTensor:
    """Draw the key of each image of a batch, from which all of its noise follows.

    Args:
        batch_size (`int`): Number of images.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            A list holds one generator per image. A single generator serves the images one after the other, so the
            first image of a batch is the one that would be drawn alone. `None` means torch's default generator.
        device (`torch.device`): Device of the result.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: Keys.
    """
    generators = generator if isinstance(generator, list) else [generator] * batch_size
    options = [{"generator": g, "device": g.device if g is not None else device} for g in generators]
    return torch.stack([torch.randint(2**62, (), **each).to(device) for each in options])


def gumbel_noise(keys: torch.LongTensor, indices: int | torch.LongTensor, vocab_size: int) -> torch.Tensor:
    """Compute the noise of a code for every token of the vocabulary, from the standard Gumbel distribution.

    Args:
        keys (`torch.LongTensor` of shape `(batch,)`): Keys of the images.
        indices (`int` or `torch.LongTensor` of shape `(batch,)`): Index of the code in its image, in raster order.
        vocab_size (`int`): Number of tokens.

    Returns:
        `torch.Tensor` of shape `(batch, vocab_size)`: Noise between -2.9 and 22.9, float32.
    """
    places = torch.as_tensor(indices, device=keys.device) + 1
    rows = _mix(keys + places * _STEP)  # products of tensors wrap around
    tokens = torch.arange(1, vocab_size + 1, device=keys.device) * _STEP
    upper = (_mix(rows[:, None] + tokens) >> 32) & 0xFFFFFFFF
    # Numbers near 0 have the finest resolution in float32. They become the largest noise, which decides what is drawn.
    uniforms = (upper.float() + 0.5).mul_(2**-32).clamp_(max=1 - 2**-24)
    return uniforms.neg_().log1p_().neg_().log_().neg_()


def _mix(states: torch.LongTensor) -> torch.LongTensor:
    """SplitMix64's output for each state. The product wraps around as it does with unsigned numbers."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        states = _shift_right(states, shift).bitwise_xor_(states).mul_(multiplier)
    return _shift_right(states, 31).bitwise_xor_(states)


def _shift_right(states: torch.LongTensor, bits: int) -> torch.LongTensor:
    # torch shifts in copies of the sign bit, which are removed.
    return (states >> bits).bitwise_and_(2 ** (64 - bits) - 1)
