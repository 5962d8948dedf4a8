"""A feature extractor that needs no weights, and a pipeline of another library."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from llamagen_hf.evaluation.inception import ImageFeatures


class Thumbnails:
    """Features that need no weights: the image itself, much smaller."""

    fingerprint = "thumbnails"

    def __init__(self):
        self.seen = 0

    def __call__(self, batch):
        self.seen += len(batch)
        values = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
        pool = torch.nn.functional.adaptive_avg_pool2d(values, 2).flatten(1)
        return ImageFeatures(pool, values[:, 0].flatten(1)[:, :7], pool[:, :5])


def build_dit_pipeline():
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=4,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=4)
    return DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
