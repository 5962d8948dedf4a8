"""Train a CLIP, new or from released weights, on images and their captions.

accelerate launch pipelines/train_clip.py --config pipelines/recipes/emoji_clip.yaml [--batch_size 128 ...]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["train-clip", *sys.argv[1:]])
