"""Train a classifier of noisy images, which guides pixel diffusion towards a class.

accelerate launch pipelines/train_classifier.py --config pipelines/recipes/emoji_classifier.yaml [--batch_size 32 ...]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["train-classifier", *sys.argv[1:]])
