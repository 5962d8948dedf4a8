"""Stage 1: train the image tokenizer.

accelerate launch pipelines/train_tokenizer.py --config pipelines/recipes/emoji.yaml [--learning_rate 1e-4 ...]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["train-tokenizer", *sys.argv[1:]])
