"""Stage 2: turn the images of a dataset into codes, once.

accelerate launch pipelines/extract_codes.py --config pipelines/recipes/emoji.yaml [--num_crops 1 ...]
"""

from llamagen_cli.stages import extract_codes


if __name__ == "__main__":
    extract_codes(__doc__)
