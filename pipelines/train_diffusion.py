"""Train a pixel diffusion model, a base or an upsampler, and save the whole pipeline.

accelerate launch pipelines/train_diffusion.py --config pipelines/recipes/emoji_upsampler.yaml [--batch_size 32 ...]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["train-diffusion", *sys.argv[1:]])
