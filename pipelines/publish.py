"""Stage 4: publish what a training made on the Hub, with a card; run it again to update it.

python pipelines/publish.py FOLDER user/name [--private] [--space] [--license cc-by-4.0] [--no-draw]
"""

import sys

from llamagen_cli import app


if __name__ == "__main__":
    app(["publish", *sys.argv[1:]])
