"""`EmbeddingQuantizer`: CLIP embeddings as short sequences of codes, and back."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

from ..arguments import FieldError


class EmbeddingQuantizer(ModelMixin, ConfigMixin):
    r"""Turns embeddings into codes for an autoregressive prior (arXiv 2204.06125, section 2.2).

    Embeddings are rotated by principal component analysis, and the components of largest variance are kept, in falling
    order. Each is cut into buckets that hold the same share of the embeddings that it was fitted to. Nothing of it is
    trained by gradients. It stays in float32 in a pipeline of any dtype, since buckets are finer than half precision.

    Args:
        embedding_dim (`int`): Width of the embeddings.
        num_dims (`int`): Components that are kept, and so codes of an embedding.
        num_buckets (`int`, *optional*, defaults to 1024): Codes of a component.

    Example:

    ```python
    >>> quantizer = EmbeddingQuantizer(128, num_dims=36).fit(embeds)
    >>> again = quantizer.decode(quantizer.encode(embeds))
    ```
    """

    # What `from_pretrained` loads in float32 whatever `dtype` says; `_apply` does the same of what is loaded.
    _keep_in_fp32_modules = ["mean", "components", "boundaries", "centers", "kept_variance"]

    @register_to_config
    def __init__(self, embedding_dim: int, num_dims: int, num_buckets: int = 1024):
        super().__init__()
        if not 1 <= num_dims <= embedding_dim:
            raise ValueError(f"`num_dims` is {num_dims}; expected an integer from 1 to {embedding_dim}.")
        if num_buckets < 2:
            raise ValueError(f"`num_buckets` is {num_buckets}; expected an integer of at least 2.")
        self.register_buffer("mean", torch.zeros(embedding_dim))
        self.register_buffer("components", torch.zeros(num_dims, embedding_dim))
        self.register_buffer("boundaries", torch.zeros(num_dims, num_buckets - 1))
        self.register_buffer("centers", torch.zeros(num_dims, num_buckets))
        self.register_buffer("kept_variance", torch.zeros(()))

    def _apply(self, fn, recurse=True):
        """What all casts and moves are made of: move the buffers, and leave their dtype."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    @torch.no_grad()
    def fit(self, embeds: torch.Tensor) -> "EmbeddingQuantizer":
        """Fit mean, components and buckets to embeddings.

        Args:
            embeds (`torch.Tensor` of shape `(count, embedding_dim)`): Embeddings of length 1, more than `num_dims`.

        Returns:
            [`EmbeddingQuantizer`]: Itself.

        Raises:
            FieldError: If they do not fit.
        """
        self._check(embeds)
        dims, buckets = self.config.num_dims, self.config.num_buckets
        if len(embeds) <= dims:
            raise FieldError("embeds", f"`embeds` holds {len(embeds)}; more than {dims} are needed for {dims} codes.")
        embeds = embeds.double().cpu()
        mean = embeds.mean(0)
        variances, vectors = torch.linalg.eigh((embeds - mean).T.cov())  # in rising order
        variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)[:, :dims].T
        # A direction has two signs; this makes the choice that of the data, and not of the linear algebra's library.
        vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
        values = (embeds - mean) @ vectors.T
        ordered = values.sort(0).values.T.contiguous()  # (dims, count)
        places = torch.arange(1, buckets, dtype=torch.float64) / buckets * (len(embeds) - 1)
        low = places.floor().long()
        share = places - low
        boundaries = ordered[:, low] * (1 - share) + ordered[:, (low + 1).clamp(max=len(embeds) - 1)] * share
        codes = torch.searchsorted(boundaries, values.T.contiguous())
        # The mean of what fell into a bucket; of an empty one, its middle.
        edges = torch.cat([ordered[:, :1], boundaries, ordered[:, -1:]], 1)
        counts = torch.zeros_like(edges[:, 1:]).scatter_add_(1, codes, torch.ones_like(values.T))
        sums = torch.zeros_like(counts).scatter_add_(1, codes, values.T)
        centers = torch.where(counts > 0, sums / counts.clamp(min=1), (edges[:, 1:] + edges[:, :-1]) / 2)
        kept = variances[:dims].sum() / variances.sum()
        fitted = {"mean": mean, "components": vectors, "boundaries": boundaries, "centers": centers}
        for name, value in (fitted | {"kept_variance": kept}).items():
            getattr(self, name).copy_(value)
        return self

    @torch.no_grad()
    def encode(self, embeds: torch.Tensor) -> torch.LongTensor:
        """The codes `(batch, num_dims)` of embeddings `(batch, embedding_dim)`, by falling variance.

        Raises:
            FieldError: If they do not fit.
        """
        self._check(embeds)
        values = (embeds.to(self.mean) - self.mean) @ self.components.T
        return torch.searchsorted(self.boundaries, values.T.contiguous()).T.contiguous()

    @torch.no_grad()
    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """The embeddings `(batch, embedding_dim)` of codes `(batch, num_dims)`, of length 1, in float32."""
        centers = self.centers.to(codes.device).gather(1, codes.T).T
        embeds = centers @ self.components.to(centers) + self.mean.to(centers)
        return F.normalize(embeds.float(), dim=-1)

    def _check(self, embeds: torch.Tensor) -> None:
        dim = self.config.embedding_dim
        if embeds.ndim != 2 or embeds.shape[1] != dim:
            raise FieldError("embeds", f"`embeds` has shape {tuple(embeds.shape)}; expected (batch, {dim}).")
        if not embeds.isfinite().all():
            raise FieldError("embeds", "`embeds` holds numbers that are not finite.")


# Saved pipelines name the module of a class. The package itself stays where it is, whatever moves within it.
EmbeddingQuantizer.__module__ = "llamagen_hf"
