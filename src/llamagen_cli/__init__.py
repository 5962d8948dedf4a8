"""The command line, `llamagen`.

It stands beside the package, not within it: importing anything of `llamagen_hf` brings torch and diffusers, and
`--help` should not wait for them.
"""

from . import checkpoints, compare, demo, evaluate, generate, serve, stages  # noqa: F401 (each adds its commands)
from .app import app


__all__ = ["app"]
