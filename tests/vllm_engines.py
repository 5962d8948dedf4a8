"""One checkpoint, drawn by vLLM and by our own loop."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from tiny import build_vq_model, generators
from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory

from llamagen_hf import AutoregressiveImagePipeline
from llamagen_hf.llamagen.decoding import CodeDecoder
from llamagen_hf.llamagen.noise import draw_noise_keys
from llamagen_hf.llamagen.vllm.engine_args import engine_arguments
from llamagen_hf.llamagen.vllm.requests import GenerationSettings, class_prompt, sampling_params, text_prompt


def save_checkpoint(transformer, folder):
    vq_model = build_vq_model(num_vq_embeddings=transformer.config.vocab_size)
    AutoregressiveImagePipeline(vq_model, transformer).save_pretrained(folder)
    return folder


class Engines:
    """A request is a condition, codes to keep, and settings."""

    def __init__(self, llm, transformer, conditions):
        self.llm, self.model, self.conditions = llm, transformer, conditions
        self.config = transformer.config

    def condition(self, index):
        return {name: value[index : index + 1] for name, value in self.conditions.items()}

    @torch.no_grad()
    def prompt(self, index, prefix):
        condition = self.condition(index)
        if "class_ids" in condition:
            return class_prompt(self.config, int(condition["class_ids"]), prefix)
        words = condition["prompt_embeds"][condition["prompt_attention_mask"].bool()]
        return text_prompt(self.config, self.model.model.text_projector(words), prefix)

    def theirs(self, requests):
        prompts = [self.prompt(index, prefix) for index, prefix, _ in requests]
        params = [sampling_params(self.config, settings) for *_, settings in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [prefix + list(o.outputs[0].token_ids) for (_, prefix, _), o in zip(requests, outputs, strict=True)]

    def ours(self, requests):
        """Each alone, with the words padded on the left."""
        images = []
        for index, prefix, settings in requests:
            sampling = asdict(settings)
            seed = sampling.pop("seed")
            del sampling["prefix_length"]
            keys = draw_noise_keys(1, generators(seed), torch.device("cpu"))
            kept = torch.tensor([prefix], dtype=torch.long)
            codes = CodeDecoder(self.model)(keys, **self.condition(index), prefix_codes=kept, **sampling)
            images.append(codes[0].tolist())
        return images

    def request(self, index=0, prefix=(), **settings):
        return index, list(prefix), GenerationSettings(prefix_length=len(prefix), **settings)


@contextmanager
def engines(folder, transformer, conditions, **arguments) -> Iterator[Engines]:
    llm = LLM(**engine_arguments(save_checkpoint(transformer, folder), **{"enforce_eager": True, **arguments}))
    try:
        yield Engines(llm, transformer, conditions)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
