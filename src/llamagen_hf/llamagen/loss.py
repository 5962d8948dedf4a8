"""The generator's loss, and checks that inputs and labels fit its configuration."""

import torch
import torch.nn.functional as F
from transformers import Cache

from .configuration import LlamaGenConfig


def check_inputs(
    config: LlamaGenConfig,
    input_ids: torch.LongTensor | None,
    inputs_embeds: torch.Tensor | None,
    prompt_embeds: torch.Tensor | None,
    prompt_attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
) -> None:
    """Raise a `ValueError` if the inputs of a forward pass do not fit the configuration."""
    if config.conditioning == "class":
        if prompt_embeds is not None:
            raise ValueError("This model is class-conditional: pass the class in `input_ids`, not `prompt_embeds`.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        return
    if prompt_embeds is None:
        # A cache may keep its length in a tensor, and reading it would stall the device at every step.
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if isinstance(past, int) and past == 0 and inputs_embeds is None:
            raise ValueError("This model is text-conditional: pass `prompt_embeds`.")
        return
    expected = (config.condition_length, config.condition_dim)
    if prompt_embeds.ndim != 3 or tuple(prompt_embeds.shape[1:]) != expected:
        raise ValueError(
            f"`prompt_embeds` has shape {tuple(prompt_embeds.shape)}; expected (batch, {expected[0]}, {expected[1]})."
        )
    if prompt_attention_mask is not None and prompt_attention_mask.shape != prompt_embeds.shape[:2]:
        raise ValueError(
            f"`prompt_attention_mask` has shape {tuple(prompt_attention_mask.shape)}; "
            f"expected {tuple(prompt_embeds.shape[:2])}."
        )


def code_loss(
    logits: torch.Tensor, labels: torch.LongTensor, num_items_in_batch: int | torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the mean cross-entropy of codes.

    Args:
        logits (`torch.Tensor` of shape `(batch, m, vocab_size)`): Position i predicts code i.
        labels (`torch.LongTensor` of shape `(batch, n)`): The codes, n <= m; -100 excludes a code.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            Divisor of the sum; by default the number of codes that are not excluded.

    Returns:
        `torch.Tensor`: A scalar, in nats; 0 if all codes are excluded.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if len(labels) != len(logits):
        raise ValueError(f"`labels` has {len(labels)} rows, but the inputs have {len(logits)}.")
    if labels.shape[1] > logits.shape[1]:
        raise ValueError(f"`labels` holds {labels.shape[1]} codes, but the inputs predict only {logits.shape[1]}.")
    total = F.cross_entropy(logits[:, : labels.shape[1]].flatten(0, 1), labels.flatten().long(), reduction="sum")
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def check_labels(
    config: LlamaGenConfig,
    labels: torch.Tensor,
    input_ids: torch.LongTensor | None,
    logits_to_keep: int | torch.Tensor,
) -> None:
    """Raise a `ValueError` unless labels are codes, each at the position that predicts it."""
    if labels.ndim != 2 or labels.shape[1] > config.num_codes:
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}; expected (batch, n): at most {config.num_codes} codes to "
            "predict, in raster order, without the condition."
        )
    if labels.is_floating_point():
        raise ValueError(f"`labels` has dtype {labels.dtype}; expected integers.")
    if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
        raise ValueError("`labels` needs the logits of all positions; leave out `logits_to_keep`.")
    is_left_out = labels == -100
    is_wrong = ~(is_left_out | (labels >= 0) & (labels < config.vocab_size)).all()
    if config.conditioning == "class" and input_ids is not None and input_ids.shape == labels.shape:
        # Other causal models take a copy of the inputs, its first id replaced by -100, and shift it themselves.
        repeats = is_left_out[:, 0].all() & (is_left_out | (labels == input_ids))[:, 1:].all()
        follows = (is_left_out[:, :-1] | (labels[:, :-1] == input_ids[:, 1:])).all()
        is_wrong = is_wrong | (repeats & ~follows)
    if is_wrong:
        raise ValueError(
            f"`labels` must be the codes to predict, 0 to {config.vocab_size - 1}, starting with the first code and "
            "without the condition, or -100 to exclude a code; for `input_ids` with the class in front, pass "
            "`input_ids[:, 1:]`."
        )
