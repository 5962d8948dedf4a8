"""Stage 2: turn the images of a dataset into codes, once.

accelerate launch pipelines/extract_codes.py --config pipelines/recipes/emoji.yaml [--num_crops 1 ...]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["extract-codes", *sys.argv[1:]])
