"""Stage 3: train the generator on codes and their conditions, and save the whole pipeline.

accelerate launch pipelines/train_generator.py --config pipelines/recipes/emoji.yaml [--learning_rate 1e-4 ...]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["train-generator", *sys.argv[1:]])
