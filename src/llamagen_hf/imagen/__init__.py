"""Imagen's cascade (arXiv 2205.11487): a base draws a small image, and upsamplers enlarge it."""
