"""A running app with a tiny model, what to ask it, and what it shows."""

import os
from contextlib import contextmanager

from PIL import Image


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from llamagen_hf.demo import launch  # noqa: E402
from llamagen_hf.demo.app import lay_out, read_examples  # noqa: E402


@contextmanager
def running(pipe, **kwargs):
    demo = lay_out(pipe, read_examples(pipe, None), "tiny", **kwargs)
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        yield url
    finally:
        demo.close()


def arguments(prompt="a red apple", seed="3", count=1, scale=2.0, preview="every row"):
    return prompt, scale, 1.0, 0, 1.0, seed, count, preview


def shown_images(gallery):
    """What the gallery shows, decoded."""
    entries = gallery["value"] if isinstance(gallery, dict) else gallery
    return [Image.open(entry["image"]).convert("RGB") for entry in entries]
