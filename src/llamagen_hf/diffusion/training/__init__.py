"""The training of pixel diffusion: bases, upsamplers, adapters, distilled models and classifiers."""
