"""The image tokenizer: an image becomes a grid of codes, and a grid of codes becomes an image.

An encoder, a codebook of unit-length vectors and a decoder, as in section 2.1 of LlamaGen (arXiv 2406.06525), which
follows VQGAN (arXiv 2012.09841) with the small normalised codebook of ViT-VQGAN (arXiv 2110.04627).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


@dataclass
class LlamaGenVQEncoderOutput(BaseOutput):
    """What [`LlamaGenVQModel.encode`] returns.

    Args:
        codes (`torch.LongTensor` of shape `(batch, height, width)`): Index of each cell's nearest codebook vector.
        quantized (`torch.Tensor` of shape `(batch, vq_embed_dim, height, width)`):
            The codebook vectors at those indices, of unit length. Gradients pass straight through to the encoder.
        vq_loss (`torch.Tensor`, scalar): Pulls the codebook towards the encoder's output.
        commit_loss (`torch.Tensor`, scalar): Pulls the encoder's output towards the codebook, times `commit_weight`.
        entropy_loss (`torch.Tensor`, scalar): Favours sharp assignments and evenly used codes, times `entropy_weight`.
        codebook_usage (`torch.Tensor`, scalar): Fraction of the codebook that this batch uses, in (0, 1].
    """

    # Every field has a default because accelerate rebuilds outputs from a dict when it casts them to float32.
    codes: torch.LongTensor | None = None
    quantized: torch.Tensor | None = None
    vq_loss: torch.Tensor | None = None
    commit_loss: torch.Tensor | None = None
    entropy_loss: torch.Tensor | None = None
    codebook_usage: torch.Tensor | None = None


@dataclass
class LlamaGenVQOutput(LlamaGenVQEncoderOutput):
    """What [`LlamaGenVQModel.forward`] returns: the reconstruction and the encoder's output.

    Args:
        sample (`torch.Tensor` of shape `(batch, out_channels, height, width)`): The reconstructed images.
    """

    sample: torch.Tensor | None = None

    def __post_init__(self):
        super().__post_init__()
        self.move_to_end("sample", last=False)  # so that it is `[0]`, as in every diffusers autoencoder


class VectorQuantizer(nn.Module):
    """Nearest-neighbour search in a codebook. Codebook vectors and inputs are both scaled to unit length.

    The codebook is stored as trained and normalised at each look-up, as the released weights expect.
    """

    def __init__(self, num_vq_embeddings: int, vq_embed_dim: int, commit_weight: float, entropy_weight: float):
        super().__init__()
        self.commit_weight = commit_weight
        self.entropy_weight = entropy_weight
        self.embedding = nn.Embedding(num_vq_embeddings, vq_embed_dim)
        with torch.no_grad():  # uniform directions, at unit length so that no code moves faster than the others
            self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))

    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Map codes of any shape `(...)` to unit vectors `(..., vq_embed_dim)`."""
        return F.normalize(self.embedding(codes), dim=-1)

    def forward(self, latents: torch.Tensor) -> LlamaGenVQEncoderOutput:
        # Distances between unit vectors differ only in the last digits, so use float32 whatever the dtype or autocast.
        with torch.autocast(latents.device.type, enabled=False):
            z = F.normalize(latents.permute(0, 2, 3, 1).float(), dim=-1)
            # Call the module instead of reading its weight: offloaded weights are present only during a call.
            indices = torch.arange(self.embedding.num_embeddings, device=latents.device)
            codebook = F.normalize(self.embedding(indices).float(), dim=-1)
            flat = z.flatten(0, 2)
            distances = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
        codes = distances.argmin(1).view(z.shape[:-1])
        quantized = codebook[codes]

        output = LlamaGenVQEncoderOutput(
            codes=codes,
            quantized=(z + (quantized - z).detach()).permute(0, 3, 1, 2).to(latents.dtype).contiguous(),
            vq_loss=F.mse_loss(quantized, z.detach()),
            commit_loss=self.commit_weight * F.mse_loss(z, quantized.detach()),
            entropy_loss=z.new_zeros(()),
            codebook_usage=codes.flatten().bincount(minlength=len(codebook)).count_nonzero() / len(codebook),
        )
        if self.entropy_weight:
            output.entropy_loss = self.entropy_weight * entropy_loss(-distances)
        return output


def entropy_loss(affinity: torch.Tensor, temperature: float = 0.01) -> torch.Tensor:
    """The mean entropy of the cells' assignments minus the entropy of the mean assignment (arXiv 2310.05737).

    Args:
        affinity (`torch.Tensor` of shape `(cells, codes)`): Negative squared distances.
        temperature (`float`, *optional*, defaults to 0.01): Divides the affinity before the softmax.
    """
    log_probs = F.log_softmax(affinity / temperature, dim=-1)
    probs = log_probs.exp()
    mean_probs = probs.mean(0)
    sample_entropy = -(probs * log_probs).sum(-1).mean()
    return sample_entropy + (mean_probs * (mean_probs + 1e-5).log()).sum()


class LlamaGenVQModel(ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""LlamaGen's image tokenizer.

    The defaults are those of the released VQ-16, which maps 256x256 pixels to a 16x16 grid of codes from a codebook
    of 16,384. VQ-8 has `block_out_channels=(128, 256, 256, 512)`. Each level except the last halves the side.

    `enable_slicing()` encodes and decodes one image at a time, which takes less memory. `enable_tiling()` processes
    larger images in tiles of `tile_sample_min_size` pixels, by default `sample_size`. Tiles overlap by
    `tile_overlap_factor` and are blended there. Each tile is encoded and decoded without seeing the others, so the
    codes and pixels differ from those of the whole image.

    Args:
        in_channels (`int`, *optional*, defaults to 3): Channels of the input images.
        out_channels (`int`, *optional*, defaults to 3): Channels of the decoded images.
        block_out_channels (`tuple[int]`, *optional*, defaults to `(128, 128, 256, 256, 512)`):
            Width of each level, from full resolution down. The lowest level has attention.
        layers_per_block (`int`, *optional*, defaults to 2): Residual blocks per level; the decoder has one more.
        latent_channels (`int`, *optional*, defaults to 256): Channels between the encoder or decoder and the codebook.
        num_vq_embeddings (`int`, *optional*, defaults to 16384): Number of codes.
        vq_embed_dim (`int`, *optional*, defaults to 8): Width of a codebook vector.
        norm_num_groups (`int`, *optional*, defaults to 32): Groups of the group normalisation.
        sample_size (`int`, *optional*, defaults to 256): Side of the training images, in pixels.
        commit_weight (`float`, *optional*, defaults to 0.25): Factor in `commit_loss`.
        entropy_weight (`float`, *optional*, defaults to 0.0): Factor in `entropy_loss`; 0 skips its computation.

    Example:

    ```python
    >>> import torch
    >>> from llamagen_hf import LlamaGenVQModel

    >>> model = LlamaGenVQModel(block_out_channels=(32, 64), num_vq_embeddings=64, latent_channels=32)
    >>> codes = model.encode(torch.zeros(1, 3, 32, 32)).codes
    >>> codes.shape, model.decode_codes(codes).shape
    (torch.Size([1, 16, 16]), torch.Size([1, 3, 32, 32]))
    ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "VectorQuantizer"]
    # These modules are called separately. `embedding` is the codebook inside `quantize`.
    _group_offload_block_modules = ["encoder", "quant_conv", "quantize", "embedding", "post_quant_conv", "decoder"]
    _skip_layerwise_casting_patterns = ["quantize"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        latent_channels: int = 256,
        num_vq_embeddings: int = 16384,
        vq_embed_dim: int = 8,
        norm_num_groups: int = 32,
        sample_size: int = 256,
        commit_weight: float = 0.25,
        entropy_weight: float = 0.0,
    ):
        super().__init__()
        plain = len(block_out_channels) - 1
        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
        )
        self.quant_conv = nn.Conv2d(latent_channels, vq_embed_dim, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, vq_embed_dim, commit_weight, entropy_weight)
        self.post_quant_conv = nn.Conv2d(vq_embed_dim, latent_channels, 1)
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        # Named as in AutoencoderKL.
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_overlap_factor = 0.25

    @property
    def downsample_factor(self) -> int:
        """Side of one code, in pixels."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @apply_forward_hook
    def encode(self, images: torch.Tensor, return_dict: bool = True) -> LlamaGenVQEncoderOutput | tuple:
        """Turn images into codes.

        Args:
            images (`torch.Tensor` of shape `(batch, in_channels, height, width)`):
                Pixels in [-1, 1]. Both sides must be multiples of `downsample_factor`.
            return_dict (`bool`, *optional*, defaults to `True`):
                `False` returns a tuple whose first item is the codes.

        Returns:
            [`LlamaGenVQEncoderOutput`]: Codes, their codebook vectors, and the quantizer's training losses.

        Raises:
            ValueError: If the shape of `images` is wrong.
        """
        factor = self.downsample_factor
        if images.ndim != 4 or images.shape[1] != self.config.in_channels or images.numel() == 0:
            raise ValueError(
                f"`images` has shape {tuple(images.shape)}; "
                f"expected (batch, {self.config.in_channels}, height, width)."
            )
        if images.shape[2] % factor or images.shape[3] % factor:
            height, width = images.shape[2:]
            raise ValueError(f"Images are {height}x{width} pixels; both sides must be multiples of {factor}.")
        output = self.quantize(self._in_parts(self._encode, images, factor, 1))
        return output if return_dict else output.to_tuple()

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(images))

    @apply_forward_hook
    def lookup(self, codes: torch.LongTensor) -> torch.Tensor:
        """Map codes of any shape `(...)` to their codebook vectors `(..., vq_embed_dim)`, of unit length."""
        return self.quantize.lookup(codes)

    @apply_forward_hook
    def decode(self, quantized: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """Turn codebook vectors into images.

        Args:
            quantized (`torch.Tensor` of shape `(batch, vq_embed_dim, height, width)`): The codebook vectors.
            return_dict (`bool`, *optional*, defaults to `True`): `False` returns a tuple that holds the images.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`]: `sample` holds the images, as [`decode_codes`]
            returns them.
        """
        sample = self._in_parts(self._decode, quantized, 1, self.downsample_factor)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(quantized))

    def _in_parts(
        self, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, cell_in: int, cell_out: int
    ) -> torch.Tensor:
        """Call `run` on all images at once, or on single images and tiles if slicing and tiling are enabled.

        Args:
            run (`Callable`): Maps images to latents, or latents to images.
            x (`torch.Tensor` of shape `(batch, channels, height, width)`): The input of `run`.
            cell_in, cell_out (`int`): Side of one code in the input and in the output.
        """
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._in_parts(run, one, cell_in, cell_out) for one in x.split(1)])
        tile = max(1, self.tile_sample_min_size // self.downsample_factor)  # its side in codes
        if not self.use_tiling or max(x.shape[2:]) <= tile * cell_in:
            return run(x)
        stride = max(1, int(tile * (1 - self.tile_overlap_factor)))
        size, step = tile * cell_in, stride * cell_in
        overlap, kept = (tile - stride) * cell_out, stride * cell_out
        above: list[torch.Tensor] = []
        rows = []
        for top in range(0, x.shape[2], step):
            row, pieces = [], []
            for column, left in enumerate(range(0, x.shape[3], step)):
                part = run(x[:, :, top : top + size, left : left + size])
                if above:
                    part = AutoencoderKL.blend_v(self, above[column], part, overlap)
                if row:
                    part = AutoencoderKL.blend_h(self, row[-1], part, overlap)
                row.append(part)
                pieces.append(part[:, :, :kept, :kept])
            above = row
            rows.append(torch.cat(pieces, dim=3))
        return torch.cat(rows, dim=2)

    @apply_forward_hook
    def decode_codes(self, codes: torch.LongTensor) -> torch.Tensor:
        """Turn codes into images.

        Args:
            codes (`torch.LongTensor` of shape `(batch, height, width)`): Codes, each in [0, `num_vq_embeddings`).

        Returns:
            `torch.Tensor` of shape `(batch, out_channels, height * downsample_factor, width * downsample_factor)`:
            Pixels, nominally in [-1, 1]. The decoder can overshoot, so clamp them before you show them.

        Raises:
            ValueError: If the shape of `codes` is wrong or a code is out of range.
        """
        if codes.ndim != 3:
            raise ValueError(f"`codes` has shape {tuple(codes.shape)}; expected (batch, height, width).")
        is_traced = torch.compiler.is_compiling()  # a graph can't depend on the values of codes
        if codes.numel() and not is_traced and not (0 <= codes.min() and codes.max() < self.config.num_vq_embeddings):
            raise ValueError(
                f"`codes` holds {int(codes.min())}..{int(codes.max())}; "
                f"expected 0..{self.config.num_vq_embeddings - 1}."
            )
        return self.decode(self.lookup(codes).permute(0, 3, 1, 2).contiguous()).sample

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> LlamaGenVQOutput | tuple:
        """Encode images and decode them again.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Pixels in [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                `False` returns a tuple whose first item is the reconstruction.

        Returns:
            [`LlamaGenVQOutput`]: The reconstruction, and what [`encode`] returns.

        Raises:
            ValueError: If the shape of `sample` is wrong.
        """
        encoded = self.encode(sample)
        output = LlamaGenVQOutput(sample=self.decode(encoded.quantized).sample, **encoded)
        return output if return_dict else output.to_tuple()


# Saved pipelines record the module of each class. The package's name is stable, while files in it may move.
LlamaGenVQModel.__module__ = "llamagen_hf"
