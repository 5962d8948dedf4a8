"""The Space; https://huggingface.co/docs/hub/spaces-config-reference describes how it is started."""

import os


try:
    import spaces  # noqa: F401 (on ZeroGPU it must come before torch)
except ImportError:
    pass

from llamagen_hf.demo import build_demo, launch


names = {"checkpoint": "LLAMAGEN_CHECKPOINT", "upsampler": "LLAMAGEN_UPSAMPLER", "dtype": "LLAMAGEN_DTYPE"}
demo = build_demo(**{option: os.environ.get(name) or None for option, name in names.items()})

if __name__ == "__main__":
    launch(demo)
