"""Pixel diffusion: what Imagen's three U-Nets (arXiv 2205.11487) and DALL-E 2's decoder share."""
