"""The Space; https://huggingface.co/docs/hub/spaces-config-reference describes how it is started."""

import os


try:
    import spaces  # noqa: F401 (on ZeroGPU it must come before torch)
except ImportError:
    pass

from llamagen_hf.demo import build_demo, launch


demo = build_demo(os.environ.get("LLAMAGEN_CHECKPOINT"), dtype=os.environ.get("LLAMAGEN_DTYPE"))

if __name__ == "__main__":
    launch(demo)
