"""The command line, `llamagen`.

It stands beside the package, not within it: importing anything of `llamagen_hf` brings torch and diffusers, and
`--help` should not wait for them.
"""

from . import (  # noqa: F401 (each adds its commands)
    checkpoints,
    compare,
    demo,
    evaluate,
    generate,
    info,
    join,
    serve,
    stages,
    upscale,
)
from .app import app


__all__ = ["app"]
