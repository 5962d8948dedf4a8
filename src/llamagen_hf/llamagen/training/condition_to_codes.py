"""Condition and codes in, loss out: the module that generator training optimizes."""

from collections.abc import Iterable

import torch
from torch import nn

from ...conditioning.text import encode_tokens
from ..modeling import LlamaGenForConditionalGeneration


class ConditionToCodes(nn.Module):
    """The Llama, and the text encoder if it learns along, as one module that one optimizer and launcher sees.

    Args:
        transformer ([`LlamaGenForConditionalGeneration`]): Predicts the codes.
        text_encoder (`torch.nn.Module`, *optional*): Encodes captions that come as tokens.
    """

    def __init__(self, transformer: LlamaGenForConditionalGeneration, text_encoder: nn.Module | None = None):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def forward(
        self,
        codes: torch.LongTensor,
        class_labels: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.LongTensor | None = None,
        without_condition: bool = False,
    ) -> torch.Tensor:
        """Mean cross-entropy of the codes, in nats.

        Args:
            codes (`torch.LongTensor` of shape `(batch, codes)`): Code grids in raster order.
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Class ids.
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch, words)`, *optional*): Tokenized captions.
            prompt_embeds (`torch.Tensor` of shape `(batch, condition_length, condition_dim)`, *optional*):
                Text states in place of tokens.
            prompt_attention_mask (`torch.LongTensor` of shape `(batch, condition_length)`, *optional*): Their mask.
            without_condition (`bool`, *optional*, defaults to `False`): Put the null condition in its place.
        """
        config = self.transformer.config
        if class_labels is not None:
            ids = torch.full_like(class_labels, config.num_classes) if without_condition else class_labels
            input_ids = torch.cat([config.vocab_size + ids[:, None], codes[:, :-1]], dim=1)
            return self.transformer(input_ids, use_cache=False, labels=codes).loss
        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = encode_tokens(
                self.text_encoder, input_ids, attention_mask, config.condition_length
            )
        if without_condition:
            null = self.transformer.model.uncond_embedding(len(codes))
            prompt_embeds = null.to(prompt_embeds.dtype)
        return self.transformer(
            codes[:, :-1],
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            use_cache=False,
            labels=codes,
        ).loss


def parameter_groups(
    model: ConditionToCodes, learning_rate: float, text_learning_rate: float | None, weight_decay: float
) -> list[dict]:
    """AdamW groups: decay for matrices and none for vectors as in the paper, and the text path's own rate.

    At the rate that suits a small Llama, a projector that starts to learn along with it grows one large vector for
    all prompts within a few hundred steps and tells them apart no more. A slower one does not.
    """
    text_rate = learning_rate if text_learning_rate is None else text_learning_rate
    text_path = ("text_encoder.", "transformer.model.text_projector.", "transformer.model.uncond_embedding.")
    groups = []
    for is_text, rate in ((False, learning_rate), (True, text_rate)):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        chosen = [p for name, p in named if name.startswith(text_path) == is_text]
        for parameters, decay in (
            ([p for p in chosen if p.ndim >= 2], weight_decay),
            ([p for p in chosen if p.ndim < 2], 0.0),
        ):
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups


@torch.no_grad()
def mean_loss(model: ConditionToCodes, batches: Iterable[dict], without_condition: bool = False) -> tuple[float, int]:
    """Mean cross-entropy in nats over all codes of `batches`, and the number of rows."""
    device = next(model.parameters()).device  # the module may come wrapped
    was_training = model.training
    model.eval()
    total, rows = 0.0, 0
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        total += model(**batch, without_condition=without_condition).item() * len(batch["codes"])
        rows += len(batch["codes"])
    model.train(was_training)
    return total / max(rows, 1), rows
