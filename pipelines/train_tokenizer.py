"""Stage 1: train the image tokenizer.

accelerate launch pipelines/train_tokenizer.py --config pipelines/recipes/emoji.yaml [--learning_rate 1e-4 ...]
"""

import json
import logging

from llamagen_hf.data.images import DataConfig
from llamagen_hf.training.recipe import parse_recipe
from llamagen_hf.training.tokenizer import TokenizerTrainingConfig, train_tokenizer


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    data, config = parse_recipe(__doc__, ("data", DataConfig), ("tokenizer", TokenizerTrainingConfig))
    print(json.dumps(train_tokenizer(data, config), indent=2))
