"""From logits to codes by pure functions, in the released order: guidance, temperature, top-k, top-p, draw."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from ..arguments import FieldError, is_integer, plain
from .noise import gumbel_noise


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How codes are drawn from logits. `None` stands for the default of the checkpoint.

    Args:
        guidance_scale (`float`, *optional*):
            Strength of classifier-free guidance, at least 0. 1 turns it off and halves the work.
        guidance_interval (`int`, *optional*, defaults to -1): See [`is_guided`].
        temperature (`float`, *optional*): Divides the logits, at least 0; 0 takes the likeliest code.
        top_k (`int`, *optional*): Number of codes to draw from; 0 means all.
        top_p (`float`, *optional*): Probability mass to draw from, in [0, 1]; 1 means all.
    """

    guidance_scale: float | None = None
    guidance_interval: int = -1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        for name, value in self.sampling.items():
            object.__setattr__(self, name, plain(value))

    @property
    def sampling(self) -> dict[str, float | None]:
        """The five settings by name, also of a subclass that has more fields."""
        return {field.name: getattr(self, field.name) for field in fields(SamplingParams)}

    def filled(self, defaults: Mapping[str, float] | None = None) -> "SamplingParams":
        """These settings without `None`.

        Args:
            defaults (`Mapping[str, float]`, *optional*): In place of `None`. What it does not name is neutral: no
                guidance, temperature 1, all codes.
        """
        values = NEUTRAL | dict(defaults or {})
        return SamplingParams(**{name: values[name] if v is None else v for name, v in self.sampling.items()})

    def fill(self) -> None:
        """Put neutral values in place of `None`, when a subclass without a checkpoint is made."""
        for name, value in self.filled().sampling.items():
            object.__setattr__(self, name, value)

    def check_sampling(self) -> None:
        """Check that all settings are in range.

        Raises:
            FieldError: If one is not.
        """

        def is_number(value):
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

        expected = {
            "guidance_scale": (lambda v: is_number(v) and v >= 0, "a number of at least 0 (1 turns it off)"),
            "guidance_interval": (lambda v: is_integer(v) and v >= -1, "-1 (always) or a code index"),
            "temperature": (lambda v: is_number(v) and v >= 0, "a number of at least 0 (0 takes the likeliest code)"),
            "top_k": (lambda v: is_integer(v) and v >= 0, "an integer of at least 0 (0 keeps all codes)"),
            "top_p": (lambda v: is_number(v) and 0 <= v <= 1, "a number in [0, 1] (1 keeps all codes)"),
        }
        for name, (is_valid, what) in expected.items():
            value = getattr(self, name)
            if value is not None and not is_valid(value):
                raise FieldError(name, f"`{name}` is {value}; expected {what}.")


NEUTRAL = {"guidance_scale": 1.0, "guidance_interval": -1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
# Where neither the call nor the checkpoint says otherwise.
SAMPLING_DEFAULTS = {"guidance_scale": 4.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Apply classifier-free guidance to logits (arXiv 2207.12598), with the released code's parametrisation.

    Args:
        conditional, unconditional (`torch.Tensor` of shape `(batch, V)`): Logits with and without the condition.
        scale (`float` or `torch.Tensor` of shape `(batch, 1)`):
            Guidance scale, the same for all rows or one per row. 1 returns `conditional`.

    Returns:
        `torch.Tensor` of shape `(batch, V)`: The guided logits.
    """
    return unconditional + scale * (conditional - unconditional)


def is_guided(index: int, interval: int) -> bool:
    """Return whether code `index` of an image is guided.

    With `interval` -1, every code is. Otherwise the first `interval + 2` codes are, as with the released
    `cfg_interval`, which starts counting at the second code and includes its own end.
    """
    return interval < 0 or index <= interval + 1


def filter_top_k(logits: torch.Tensor, top_k: int | torch.LongTensor) -> torch.Tensor:
    """Set all but the `top_k` largest logits to -inf. Ties with the smallest of them stay.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): The logits.
        top_k (`int` or `torch.LongTensor`):
            Number of codes to keep; 0 keeps all. A tensor `(batch,)` on the CPU holds one number per row of logits
            `(batch, V)`.

    Returns:
        `torch.Tensor` of shape `(..., V)`: The filtered logits.
    """
    if isinstance(top_k, torch.Tensor):
        if not top_k.any():
            return logits
        most = min(int(top_k.max()), logits.shape[-1])
        count = top_k.to(logits.device)[:, None].clamp(max=most)
        threshold = logits.topk(most, dim=-1).values.gather(-1, (count - 1).clamp(min=0))
        return logits.masked_fill((logits < threshold) & (count > 0), -torch.inf)
    if top_k == 0:
        return logits
    threshold = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def filter_top_p(logits: torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    """Set the logits outside the nucleus to -inf (arXiv 1904.09751).

    The nucleus is the smallest set of codes whose probability exceeds `top_p`. The code that crosses the threshold
    and the likeliest code always stay.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): The logits.
        top_p (`float` or `torch.Tensor`):
            Probability in [0, 1]; 1 keeps all codes. A tensor `(batch,)` on the CPU holds one number per row of logits
            `(batch, V)`.

    Returns:
        `torch.Tensor` of shape `(..., V)`: The filtered logits.
    """
    if isinstance(top_p, torch.Tensor):
        (rows,) = (top_p < 1).nonzero(as_tuple=True)  # sorting is the most expensive part of a draw
        if len(rows) == 0:
            return logits
        thresholds, rows = top_p[rows, None].to(logits.device), rows.to(logits.device)
        return logits.index_copy(0, rows, _nucleus(logits[rows], thresholds))
    return logits if top_p == 1 else _nucleus(logits, top_p)


def _nucleus(logits: torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    ordered, order = logits.sort(dim=-1, descending=True)
    mass_before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    mass_before[..., 0] = -1.0
    remove = (mass_before > top_p).scatter(-1, order, mass_before > top_p)
    return logits.masked_fill(remove, -torch.inf)


def draw(logits: torch.Tensor, noise: torch.Tensor) -> torch.LongTensor:
    """Draw one code per row: the one whose log-probability plus noise is largest (the Gumbel-max trick).

    A row's code depends on its own logits and noise alone. So a code may be drawn again when its logits are better
    known, and is the same where they are.

    Args:
        logits (`torch.Tensor` of shape `(batch, V)`): Unnormalised log-probabilities.
        noise (`torch.Tensor` of shape `(batch, V)`): See [`~llamagen_hf.llamagen.noise.gumbel_noise`].

    Returns:
        `torch.LongTensor` of shape `(batch,)`: Codes. Each has a probability above 0 if the logits are finite or -inf.
    """
    return (logits.float() + noise).argmax(-1)


def sample(
    logits: torch.Tensor,
    keys: torch.LongTensor,
    indices: int | torch.LongTensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.LongTensor = 0,
    top_p: float | torch.Tensor = 1.0,
) -> torch.LongTensor:
    """Apply temperature, top-k and top-p, in this order, and draw one code per row.

    The settings are the same for all rows, or all three are tensors `(batch,)` on the CPU: `top_k` of dtype long, the
    others float32. A row gets the same code either way.

    Args:
        logits (`torch.Tensor` of shape `(batch, V)`): Logits, after guidance.
        keys (`torch.LongTensor` of shape `(batch,)`): See [`~llamagen_hf.llamagen.noise.draw_noise_keys`].
        indices (`int` or `torch.LongTensor` of shape `(batch,)`): Index of the code in its image, in raster order.
        temperature (`float` or `torch.Tensor`, *optional*, defaults to 1.0):
            Divides the logits; 0 takes the likeliest code.
        top_k (`int` or `torch.LongTensor`, *optional*, defaults to 0): See [`filter_top_k`].
        top_p (`float` or `torch.Tensor`, *optional*, defaults to 1.0): See [`filter_top_p`].

    Returns:
        `torch.LongTensor` of shape `(batch,)`: Codes.
    """
    if isinstance(temperature, torch.Tensor):
        divisors = temperature.clamp(min=1e-5)[:, None].to(logits.device)
        filtered = filter_top_p(filter_top_k(logits / divisors, top_k), top_p)
        drawn = draw(filtered, gumbel_noise(keys, indices, logits.shape[-1]))
        if temperature.all():
            return drawn
        return torch.where((temperature == 0).to(logits.device), logits.argmax(-1), drawn)
    if temperature == 0:
        return logits.argmax(-1)
    filtered = filter_top_p(filter_top_k(logits / max(temperature, 1e-5), top_k), top_p)
    return draw(filtered, gumbel_noise(keys, indices, logits.shape[-1]))
