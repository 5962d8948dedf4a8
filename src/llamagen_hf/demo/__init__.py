"""The app of the Gradio Space, also `llamagen demo`. It needs the extra `demo`."""

from .app import build_demo, launch


__all__ = ["build_demo", "launch"]
