"""Train a prior, from captions to CLIP's image embeddings, and save it with its CLIP as a pipeline.

accelerate launch pipelines/train_prior.py --config pipelines/recipes/emoji_prior.yaml [--batch_size 32 ...]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["train-prior", *sys.argv[1:]])
