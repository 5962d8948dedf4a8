"""The Gradio app of the Space and of `llamagen demo`; it needs the extra `demo`."""

from .app import build_demo, launch


__all__ = ["build_demo", "launch"]
