"""Let a generator go on with the codes of another image tokenizer, without starting over.

python pipelines/recode_generator.py --checkpoint emoji --vq_model runs/emoji/tokenizer --dataset runs/emoji/data \
    --output runs/emoji/start

Both tokenizers encode the same images to grids of the same size. Each new code starts with the mean of the embeddings,
and of the rows of the output head, of the old codes that stand in its place. Everything else stays as it is, so the
pipeline at `--output` knows its prompts, and a training from it (`init_from`) only has to get used to the new codes.
"""

import argparse
from pathlib import Path

import torch

from llamagen_hf import AutoregressiveImagePipeline, LlamaGenConfig, LlamaGenForConditionalGeneration, LlamaGenVQModel
from llamagen_hf.autoencoders import load_vq_model
from llamagen_hf.data.loader import batches_once
from llamagen_hf.data.samples import ImageSamples, stack_images
from llamagen_hf.data.source import DataConfig
from llamagen_hf.files import replace_result


BATCH_SIZE = 64


@torch.no_grad()
def shared_places(old: LlamaGenVQModel, new: LlamaGenVQModel, batches) -> torch.Tensor:
    """How often each new code stands where each old one does: `(new codes, old codes)`.

    Raises:
        ValueError: The grids differ in size.
    """
    counts = torch.zeros(new.config.num_vq_embeddings, old.config.num_vq_embeddings)
    for batch in batches:
        before, after = (model.encode(batch["images"]).codes for model in (old, new))
        if before.shape != after.shape:
            raise ValueError(
                f"The tokenizers have grids of {tuple(before.shape[1:])} and {tuple(after.shape[1:])} codes; "
                "expected the same."
            )
        ones = torch.ones(after.numel())
        counts.index_put_((after.flatten(), before.flatten()), ones, accumulate=True)
    return counts


@torch.no_grad()
def recode(
    pipe: AutoregressiveImagePipeline, vq_model: LlamaGenVQModel, counts: torch.Tensor
) -> AutoregressiveImagePipeline:
    """The pipeline with another tokenizer, by the counts of [`shared_places`].

    Codes that stand nowhere start with the mean of all old codes.
    """
    shares = (counts + 1e-6) / (counts + 1e-6).sum(1, keepdim=True)
    config = pipe.transformer.config.to_dict() | {"vocab_size": vq_model.config.num_vq_embeddings}
    transformer = LlamaGenForConditionalGeneration(LlamaGenConfig(**config)).eval()
    state, old_size = pipe.transformer.state_dict(), pipe.transformer.config.vocab_size
    embeddings = state["model.embed_tokens.weight"]  # the codes, then the classes, if there are any
    state["model.embed_tokens.weight"] = torch.cat([shares @ embeddings[:old_size], embeddings[old_size:]])
    state["lm_head.weight"] = shares @ state["lm_head.weight"]
    transformer.load_state_dict(state)
    defaults = pipe.config.sampling_defaults
    return AutoregressiveImagePipeline(vq_model, transformer, pipe.text_encoder, pipe.tokenizer, defaults)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--checkpoint", required=True, help="Folder or Hub id of the pipeline, or emoji.")
    arguments.add_argument("--vq_model", required=True, help="Folder or Hub id of the new tokenizer.")
    arguments.add_argument("--dataset", required=True, help="Images of the kind that both tokenizers are for.")
    arguments.add_argument("--output", type=Path, required=True, help="Folder for the pipeline.")
    own = arguments.parse_args()
    pipe, vq_model = AutoregressiveImagePipeline.from_pretrained(own.checkpoint), load_vq_model(own.vq_model).eval()
    data = DataConfig(own.dataset, image_size=pipe.image_size)
    batches = batches_once(data.load("train"), ImageSamples(data), stack_images, BATCH_SIZE)
    pipe = recode(pipe, vq_model, shared_places(pipe.vq_model, vq_model, batches))
    replace_result(own.output, pipe.config_name, pipe.save_pretrained)


if __name__ == "__main__":
    main()
