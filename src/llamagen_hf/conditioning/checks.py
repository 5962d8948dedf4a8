"""Checks of prompts and of states given in their place, the same for all families."""

import torch

from ..arguments import FieldError


def check_prompt(prompt, reads_prompts: bool, field: str = "prompt") -> None:
    """Check prompts that were given.

    Args:
        prompt: A string or a list of strings.
        reads_prompts (`bool`): Whether the pipeline has a text encoder with its tokenizer.
        field (`str`, *optional*, defaults to `"prompt"`): Name of the argument.

    Raises:
        FieldError: If it is neither, or can't be read.
    """
    if not isinstance(prompt, str) and not (
        isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
    ):
        raise FieldError(field, f"`{field}` must be a string or a list of strings, not {type(prompt).__name__}.")
    if not reads_prompts:
        raise FieldError(
            field, f"This pipeline has no text encoder and tokenizer: load them with it, or pass `{field}_embeds`."
        )
    if prompt == []:
        raise FieldError(field, f"`{field}` is an empty list; pass at least one prompt.")


def check_states(
    embeds, length: int, dim: int, field: str = "prompt_embeds", mask: torch.Tensor | None = None
) -> None:
    """Check text states given in place of prompts.

    Args:
        embeds: A tensor `(batch, length, dim)`.
        length, dim (`int`): Positions and width that the checkpoint reads.
        field (`str`, *optional*, defaults to `"prompt_embeds"`): Name of the argument.
        mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 for positions that are not read.

    Raises:
        FieldError: If they are not, or if values that are read are not finite.
    """
    if not isinstance(embeds, torch.Tensor):
        raise FieldError(field, f"`{field}` must be a tensor, not {type(embeds).__name__}.")
    if embeds.ndim != 3 or tuple(embeds.shape[1:]) != (length, dim) or len(embeds) == 0:
        raise FieldError(field, f"`{field}` has shape {tuple(embeds.shape)}; expected (batch, {length}, {dim}).")
    is_masked = isinstance(mask, torch.Tensor) and mask.shape == embeds.shape[:2]
    if not (embeds[mask.to(embeds.device).bool()] if is_masked else embeds).isfinite().all():
        raise FieldError(field, f"`{field}` has values that are not finite.")


def check_mask(mask: torch.Tensor | None, embeds: torch.Tensor | None) -> None:
    """Check the `prompt_attention_mask` of `prompt_embeds`.

    Raises:
        FieldError: If there are no states, or it is of another shape.
    """
    if mask is None:
        return
    if embeds is None:
        raise FieldError(
            "prompt_attention_mask", "`prompt_attention_mask` goes with `prompt_embeds`, which is missing."
        )
    if mask.shape != embeds.shape[:2]:
        raise FieldError(
            "prompt_attention_mask",
            f"`prompt_attention_mask` has shape {tuple(mask.shape)}; expected {tuple(embeds.shape[:2])}.",
        )
