"""How likely the generator holds codes to be under their condition, by which it ranks its candidates."""

import torch
import torch.nn.functional as F

from .modeling import LlamaGenForConditionalGeneration


@torch.no_grad()
def mean_log_likelihoods(
    model: LlamaGenForConditionalGeneration,
    codes: torch.LongTensor,
    class_ids: torch.LongTensor | None = None,
    prompt_embeds: torch.Tensor | None = None,
    prompt_attention_mask: torch.LongTensor | None = None,
    **kwargs,
) -> list[float]:
    """Mean log-probability of a code given those before it and the condition, without guidance or truncation.

    Args:
        model ([`LlamaGenForConditionalGeneration`]): The generator.
        codes (`torch.LongTensor` of shape `(batch, n)`): The first n codes of images, in raster order.
        class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): Input ids of the classes, from `vocab_size` on.
        prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*): Text states.
        prompt_attention_mask (`torch.LongTensor` of shape `(batch, condition_length)`, *optional*): 1 for words.
        kwargs: Other tensors of a generation, which change nothing here.

    Returns:
        `list[float]`: One for each image, in nats, at most 0.
    """
    values = []
    for i, own in enumerate(codes):  # one at a time: the logits of all would fill the memory, and none waits for them
        row = slice(i, i + 1)
        if class_ids is not None:
            inputs = {"input_ids": torch.cat([class_ids[row], own[:-1]])[None]}
        else:
            inputs = {
                "input_ids": own[None, :-1],
                "prompt_embeds": prompt_embeds[row],
                "prompt_attention_mask": prompt_attention_mask[row],
            }
        with torch.autocast(codes.device.type, enabled=False):  # the choice does not depend on the caller's precision
            logits = model(**inputs, use_cache=False).logits[0, : len(own)]
        values.append(-F.cross_entropy(logits, own).item())
    return values
