"""The training of pixel diffusion: bases, upsamplers, adapters and distilled models."""
