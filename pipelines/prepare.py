"""Stage 0: choose, score and recaption images from the web.

python pipelines/prepare.py filter --config pipelines/recipes/laion_stage1.yaml [--min_side 512 ...]
accelerate launch pipelines/prepare.py score --config RECIPE [--scores aesthetic ...]
accelerate launch pipelines/prepare.py recaption --config RECIPE [--model llava-hf/llava-1.5-7b-hf ...]

Between filter and the others, the images have to be downloaded, for instance by img2dataset.
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["prepare", *sys.argv[1:]])
