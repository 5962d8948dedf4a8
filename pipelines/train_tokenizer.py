"""Stage 1: train the image tokenizer.

accelerate launch pipelines/train_tokenizer.py --config pipelines/recipes/emoji.yaml [--learning_rate 1e-4 ...]
"""

from llamagen_cli.stages import train_tokenizer


if __name__ == "__main__":
    train_tokenizer(__doc__)
