"""Stage 3: train the generator on codes and their conditions, and save the whole pipeline.

accelerate launch pipelines/train_generator.py --config pipelines/recipes/emoji.yaml [--learning_rate 1e-4 ...]
"""

from llamagen_cli.stages import train_generator


if __name__ == "__main__":
    train_generator(__doc__)
