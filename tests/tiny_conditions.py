"""Conditions of tiny generators."""

import torch


def class_condition(batch):
    return {"class_ids": 64 + torch.arange(batch)}


def text_condition(batch):
    mask = torch.ones(batch, 12, dtype=torch.long)
    for i in range(batch):
        mask[i, : 2 * i] = 0
    torch.manual_seed(1)
    return {"prompt_embeds": torch.randn(batch, 12, 16) * mask[..., None], "prompt_attention_mask": mask}


CONDITIONS = {"class": class_condition, "text": text_condition}
