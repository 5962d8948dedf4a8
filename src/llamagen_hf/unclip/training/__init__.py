"""The training of DALL-E 2's parts: the CLIP, and the prior."""
