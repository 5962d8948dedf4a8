"""Stage 4: publish a pipeline, a CLIP, a classifier, a LoRA adapter or codes on the Hub, with a card; run it again to update them.

python pipelines/publish.py FOLDER user/name [--private] [--space] [--license cc-by-4.0] [--no-draw]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["publish", *sys.argv[1:]])
