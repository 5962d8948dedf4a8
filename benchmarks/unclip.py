"""Does a prior help? The same emoji captions drawn by words, and by image embeddings from different sources.

python benchmarks/unclip.py --decoder runs/emoji/decoder [--prior runs/emoji/prior] [--prior runs/emoji/prior-ar]
    [--clip runs/emoji/clip] [--words emoji] [--dataset runs/emoji/data] [--split train] [--count 419]

Takes evenly spaced captions of a split and draws an image for each, caption i with the seed i, and judges the images
as benchmarks/scoreboard.py does. Each line is a way from a caption to an image:

- words: a text-conditional pipeline, which reads the caption itself.
- text embedding: the decoder, given CLIP's embedding of the caption as if it were an image's.
- prior: the decoder, given what a prior draws for the caption.
- image embedding: the decoder, given the embedding of the caption's own image: what a perfect prior would reach, and
  at the same time variations of these images.

Beside the scores: the cosine between the embedding and that of the caption's own image; how often the embedding is
nearer to it than to 99 other images of the set; and how often what was drawn from it is.
"""

import argparse
import time
from collections.abc import Callable
from datetime import date

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from scoreboard import BATCH_SIZE, Judge, commit, evenly, load_judge, to_array

from llamagen_hf import AutoregressiveImagePipeline, EmbeddingPriorPipeline
from llamagen_hf.clip import embed_images, embed_texts, load_clip
from llamagen_hf.data.source import DataConfig
from llamagen_hf.evaluation.images import open_images
from llamagen_hf.evaluation.text import r_precision
from llamagen_hf.local_paths import public_name


CANDIDATES = 100  # images among which the caption's own is looked for


def in_batches(draw: Callable[..., torch.Tensor], count: int) -> torch.Tensor:
    """What `draw(slice, generators)` gives for all of `count` rows, row i with the seed i."""
    parts = []
    for start in range(0, count, BATCH_SIZE):
        stop = min(start + BATCH_SIZE, count)
        parts.append(draw(slice(start, stop), [torch.Generator().manual_seed(i) for i in range(start, stop)]))
    return torch.cat(parts)


@torch.no_grad()
def measure(
    rows: Dataset,
    judge: Judge,
    clip: tuple,
    decoder: AutoregressiveImagePipeline,
    priors: dict[str, EmbeddingPriorPipeline],
    words: AutoregressiveImagePipeline,
) -> dict[str, dict[str, float]]:
    """The scores of each way from caption to image, by its name."""
    captions, count = list(rows["caption"]), len(rows)
    num_candidates = min(CANDIDATES, count)

    def embed(images) -> torch.Tensor:
        batches = open_images(images, decoder.image_size).batches(BATCH_SIZE)
        return torch.cat([embed_images(*clip, batch) for batch in batches])

    def guess(prior: EmbeddingPriorPipeline) -> torch.Tensor:
        def draw(part, generators):
            return prior(captions[part], generator=generators, truncate_prompt=True).image_embeds

        return in_batches(draw, count)

    def decode(embeds: torch.Tensor) -> np.ndarray:
        def draw(part, generators):
            return decoder.draw_pixels(prompt_embeds=embeds[part, None], generator=generators)

        return to_array(in_batches(draw, count))

    def read(part, generators):
        return words.draw_pixels(prompt=captions[part], generator=generators)

    own = embed(rows)
    sources = {"text embedding": embed_texts(*clip, captions)}
    sources |= {name: guess(prior) for name, prior in priors.items()} | {"image embedding": own}
    images = {"words": to_array(in_batches(read, count))}
    images |= {name: decode(embeds) for name, embeds in sources.items()}

    results = {}
    for name, drawn in images.items():
        results[name] = judge.score(drawn, rows)
        results[name]["drawn_found"] = r_precision(embed(drawn), own, num_candidates=num_candidates)
        if name in sources:
            results[name]["cosine"] = F.cosine_similarity(sources[name], own).mean().item()
            results[name]["found"] = r_precision(sources[name], own, num_candidates=num_candidates)
    return results


def show(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| from | distance to train | subgroup | style | R-precision | cosine | found | what is drawn, found |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, scores in results.items():
        shares = [f"{scores[f'{label}_accuracy']:.1%}" for label in ("subgroup", "style")]
        embedding = [f"{scores['cosine']:.3f}", f"{scores['found']:.1%}"] if "cosine" in scores else ["", ""]
        cells = [f"{scores['distance_to_train']:.2f}", *shares, f"{scores['r_precision']:.1%}", *embedding]
        lines.append(f"| {name} | {' | '.join([*cells, format(scores['drawn_found'], '.1%')])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", required=True, help="Folder of a pipeline that draws from image embeddings.")
    parser.add_argument("--prior", action="append", default=[], help="Folder of a prior; may be given more than once.")
    parser.add_argument("--clip", default="runs/emoji/clip", help="Folder of the CLIP that they were trained on.")
    parser.add_argument("--words", default="emoji", help="Folder or Hub id of a text-conditional pipeline.")
    parser.add_argument("--dataset", default="runs/emoji/data", help="The emoji, as split_emoji.py wrote them.")
    parser.add_argument("--split", default="train", help="Whose captions: train, test or unseen_style.")
    parser.add_argument("--count", type=int, default=419, help="Captions to draw.")
    args = parser.parse_args()
    start = time.perf_counter()
    train = DataConfig(args.dataset).load("train")
    rows = train if args.split == "train" else DataConfig(args.dataset, test_split=args.split).load("test")
    if not 4 <= args.count <= len(rows):
        parser.error(f"--count is {args.count}; expected 4 to {len(rows)}, the size of the split")
    rows = evenly(rows, args.count)
    priors = {}
    for folder in args.prior:
        prior = EmbeddingPriorPipeline.from_pretrained(folder)
        priors["autoregressive prior" if prior.is_autoregressive else "diffusion prior"] = prior
    decoder = AutoregressiveImagePipeline.from_pretrained(args.decoder)
    words = AutoregressiveImagePipeline.from_pretrained(args.words)
    for pipe in (*priors.values(), decoder, words):
        pipe.set_progress_bar_config(disable=True)
    results = measure(rows, load_judge({"train": train}), load_clip(args.clip), decoder, priors, words)
    print(
        f"## {date.today()}, {public_name(args.decoder)} at {commit()}\n\n"
        f"torch {torch.__version__}, transformers {transformers.__version__}; {args.count} captions of {args.split}; "
        f"decoder {decoder.sampling_settings()}, words {words.sampling_settings()}; "
        f"{(time.perf_counter() - start) / 60:.1f} minutes with {torch.get_num_threads()} threads.\n\n{show(results)}"
    )


if __name__ == "__main__":
    main()
