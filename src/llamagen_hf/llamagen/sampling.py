"""From logits to codes: pure functions, in the released order (guidance, temperature, top-k, top-p, draw)."""

import math

import torch

from ..arguments import FieldError, is_integer


def check_sampling(
    guidance_scale: float = 1.0,
    guidance_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> None:
    """Raise a [`FieldError`] of one sentence if a sampling setting is out of range."""

    def is_number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    if not is_number(guidance_scale) or guidance_scale < 0:
        raise FieldError(
            "guidance_scale",
            f"`guidance_scale` is {guidance_scale}; expected a number of at least 0 (1 turns it off).",
        )
    if not is_integer(guidance_interval) or guidance_interval < -1:
        raise FieldError(
            "guidance_interval", f"`guidance_interval` is {guidance_interval}; expected -1 (always) or a code index."
        )
    if not is_number(temperature) or temperature < 0:
        raise FieldError(
            "temperature",
            f"`temperature` is {temperature}; expected a number of at least 0 (0 takes the likeliest code).",
        )
    if not is_integer(top_k) or top_k < 0:
        raise FieldError("top_k", f"`top_k` is {top_k}; expected an integer of at least 0 (0 keeps all codes).")
    if not is_number(top_p) or not 0 <= top_p <= 1:
        raise FieldError("top_p", f"`top_p` is {top_p}; expected a number in [0, 1] (1 keeps all codes).")


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance on logits (arXiv 2207.12598), written as the released code does it.

    Args:
        conditional, unconditional (`torch.Tensor` of shape `(batch, V)`): Logits with and without the condition.
        scale (`float` or `torch.Tensor` of shape `(batch, 1)`): Strength, the same for all rows or one for each.
    """
    return unconditional + scale * (conditional - unconditional)


def is_guided(index: int, interval: int) -> bool:
    """Whether code `index` of an image is guided.

    With `interval` -1 every code is; otherwise the first `interval + 2` codes are, as with the released
    `cfg_interval`, which counts from the second code on and includes its own end.
    """
    return interval < 0 or index <= interval + 1


def filter_top_k(logits: torch.Tensor, top_k: int | torch.LongTensor) -> torch.Tensor:
    """Set all but the `top_k` largest logits `(..., V)` to -inf; ties with the last one stay, 0 keeps all.

    A tensor `(batch,)` on the CPU holds a number for each row of logits `(batch, V)`.
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
    """Keep the smallest set of codes `(..., V)` whose probability exceeds `top_p`, and at least the likeliest.

    Nucleus sampling (arXiv 1904.09751); the code that crosses the threshold stays. 1 keeps all. A tensor `(batch,)` on
    the CPU holds a number for each row of logits `(batch, V)`.
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


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.LongTensor:
    """Draw one code per row by inverting the cumulative distribution.

    One random number decides a code, so a row's code depends on its own logits and number and on nothing else in
    the batch, and all numbers of an image can be drawn beforehand.

    Args:
        logits (`torch.Tensor` of shape `(batch, V)`): Unnormalised log-probabilities.
        uniforms (`torch.Tensor` of shape `(batch,)`): Random numbers in [0, 1).

    Returns:
        `torch.LongTensor` of shape `(batch,)`: Codes, never one of probability 0 if the logits are finite or -inf.
    """
    # float32 sums over 16384 codes would shift boundaries by more than the probability of a rare code.
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logits.float().softmax(-1).cumsum(-1, dtype=precise)
    total = cumulative[:, -1:]
    threshold = uniforms.to(precise)[:, None] * total
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    # The clamp is for logits that are not finite: no code is right then, but none may lie outside the vocabulary.
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def sample(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    top_k: int | torch.LongTensor = 0,
    top_p: float | torch.Tensor = 1.0,
) -> torch.LongTensor:
    """Temperature, top-k, top-p and draw, in this order.

    Args:
        logits (`torch.Tensor` of shape `(batch, V)`): Logits, guided if guidance is wanted.
        uniforms (`torch.Tensor` of shape `(batch,)`): Random numbers in [0, 1).
        temperature (`float` or `torch.Tensor`, *optional*, defaults to 1.0):
            Divides the logits; 0 takes the likeliest code.
        top_k (`int` or `torch.LongTensor`, *optional*, defaults to 0): Codes to choose from; 0 for all.
        top_p (`float` or `torch.Tensor`, *optional*, defaults to 1.0): Probability to choose from; 1 for all.

    The settings are the same for all rows, or all three are tensors `(batch,)` on the CPU, float32 or long. Either way
    a row gets the same code.

    Returns:
        `torch.LongTensor` of shape `(batch,)`: Codes.
    """
    if isinstance(temperature, torch.Tensor):
        divisors = temperature.clamp(min=1e-5)[:, None].to(logits.device)
        drawn = draw(filter_top_p(filter_top_k(logits / divisors, top_k), top_p), uniforms)
        if temperature.all():
            return drawn
        return torch.where((temperature == 0).to(logits.device), logits.argmax(-1), drawn)
    if temperature == 0:
        return logits.argmax(-1)
    logits = filter_top_k(logits / max(temperature, 1e-5), top_k)
    return draw(filter_top_p(logits, top_p), uniforms)


def draw_uniforms(
    batch_size: int, length: int, generator: torch.Generator | list[torch.Generator] | None, device: torch.device
) -> torch.Tensor:
    """Random numbers in [0, 1) for `batch_size` images of `length` codes, `(batch_size, length)`.

    A list holds one generator per image. A single generator serves the images one after the other, so the first
    image of a batch is the one drawn alone.
    """
    generators = generator if isinstance(generator, list) else [generator] * batch_size
    # In float32 whatever the default is, since a seed draws other numbers in another dtype.
    options = [{"generator": g, "device": g.device if g is not None else device} for g in generators]
    rows = [torch.rand(length, dtype=torch.float32, **each) for each in options]
    return torch.stack([row.to(device) for row in rows])
