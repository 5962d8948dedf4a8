"""`python -m llamagen_cli`."""

from .app import app


app()
