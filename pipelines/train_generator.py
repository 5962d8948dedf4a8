"""Stage 3: train the generator on codes and captions, and save the whole pipeline.

accelerate launch pipelines/train_generator.py --config pipelines/recipes/emoji.yaml [--learning_rate 1e-4 ...]
"""

import json
import logging

from llamagen_hf.training.generator import GeneratorTrainingConfig, train_generator
from llamagen_hf.training.recipe import parse_recipe


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    (config,) = parse_recipe(__doc__, ("generator", GeneratorTrainingConfig))
    print(json.dumps(train_generator(config), indent=2))
