"""Stage 2: turn the pictures of a dataset into codes, once.

python pipelines/extract_codes.py --config pipelines/recipes/emoji.yaml [--num_crops 1 ...]
"""

import json

from llamagen_hf.data.extraction import CodeExtractionConfig, extract_codes
from llamagen_hf.data.images import DataConfig
from llamagen_hf.training.recipe import parse_recipe


if __name__ == "__main__":
    data, config = parse_recipe(__doc__, ("data", DataConfig), ("codes", CodeExtractionConfig))
    print(json.dumps(extract_codes(data, config)))
