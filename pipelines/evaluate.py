"""Stage 5: generate from checkpoints of any diffusers pipelines and measure them, on any number of processes.

python pipelines/evaluate.py CHECKPOINT --reference VIRTUAL_imagenet256_labeled.npz --preset imagenet256_paper \
    --guidance-scale 2 --output runs/evaluation
accelerate launch --num_processes 8 pipelines/evaluate.py ...
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]])
