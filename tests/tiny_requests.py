"""Requests of all kinds for engines that generate the codes of tiny models."""

import random

import torch
from tiny import generators

from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.noise import draw_noise_keys
from llamagen_hf.llamagen.serving.batch import GenerationRequest


SETTINGS = [
    {},
    {"guidance_scale": 3.0},
    {"guidance_scale": 0.0, "temperature": 0},
    {"guidance_scale": 2.5, "guidance_interval": 4, "top_k": 30},
    {"guidance_scale": 7.5, "top_p": 0.9, "temperature": 1.3},
    {"guidance_scale": 1.0, "top_k": 5, "top_p": 0.5},
    {"guidance_scale": 1.5, "guidance_interval": 0, "temperature": 0.7, "top_k": 1000},
]


def random_requests(conditioning: str, count: int) -> list[GenerationRequest]:
    """Requests with all kinds of settings, and with prefixes and prompts of all lengths."""
    choose = random.Random(0)
    requests = []
    for seed in range(count):
        prefix = [choose.randrange(64) for _ in range(choose.choice([0, 0, 0, 1, 5, 15]))]
        settings = choose.choice(SETTINGS)
        if conditioning == "class":
            condition = {"class_id": 64 + choose.randrange(10)}
        else:
            mask = torch.ones(12, dtype=torch.long)
            mask[: choose.randrange(12)] = 0
            condition = {"prompt_embeds": torch.randn(12, 16) * mask[:, None], "prompt_attention_mask": mask}
        request = GenerationRequest(seed=seed, prefix_codes=prefix, **condition, **settings)
        requests.append(request)
    return requests


def draw_alone(decoder: CodeDecoder, request: GenerationRequest) -> list[int]:
    """The codes of a request without its prefix, by the pipeline's loop."""
    condition = {"prefix_codes": torch.tensor([request.prefix_codes]).long()}
    if request.class_id is not None:
        condition["class_ids"] = torch.tensor([request.class_id])
    else:
        condition["prompt_embeds"] = request.prompt_embeds[None]
        condition["prompt_attention_mask"] = request.prompt_attention_mask[None]
    keys = draw_noise_keys(1, generators(request.seed), torch.device("cpu"))
    codes = decoder(keys, **condition, **request.sampling)
    return codes[0, len(request.prefix_codes) :].tolist()
