"""Codebooks that fit an encoder: new ones by k-means, unused codes moved to the data."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..vq_model import LlamaGenVQModel


CELLS_PER_CODE = 64  # encoder outputs that k-means looks at, for each code
ITERATIONS = 10
CHUNK = 8192  # cells whose distances to all codes are in memory together


@torch.no_grad()
def encode_cells(model: LlamaGenVQModel, images: torch.Tensor) -> torch.Tensor:
    """The encoder's outputs before they are quantized: unit vectors `(batch * height * width, vq_embed_dim)`."""
    latents = model.quant_conv(model.encoder(images))
    return F.normalize(latents.permute(0, 2, 3, 1).flatten(0, 2).float(), dim=-1)


@torch.no_grad()
def fit_codebook(cells: torch.Tensor, num_codes: int, generator: torch.Generator) -> torch.Tensor:
    """Find the codes that are nearest to unit vectors, by spherical k-means (Dhillon and Modha 2001).

    Args:
        cells (`torch.Tensor` of shape `(n, d)`): Unit vectors, at least `num_codes`.
        num_codes (`int`): Codes to find.
        generator (`torch.Generator`): Draws the first codes, and new places for codes that no cell is nearest to.

    Returns:
        `torch.Tensor` of shape `(num_codes, d)`: Unit vectors.
    """

    def draw(count: int) -> torch.Tensor:
        return cells[torch.randperm(len(cells), generator=generator)[:count].to(cells.device)]

    codes = draw(num_codes)
    for iteration in range(ITERATIONS):
        nearest = torch.cat([(chunk @ codes.T).argmax(1) for chunk in cells.split(CHUNK)])
        counts = torch.bincount(nearest, minlength=num_codes)
        sums = torch.zeros_like(codes).index_add_(0, nearest, cells)
        unused = counts == 0
        codes = torch.where(unused[:, None], codes, F.normalize(sums, dim=-1))
        if iteration < ITERATIONS - 1:  # where they are moved last is not looked at any more
            codes[unused] = draw(int(unused.sum()))
    return codes


def resize_codebook(model: LlamaGenVQModel, num_codes: int) -> None:
    """Give a tokenizer a random codebook of another size, for [`fit_codebook`] to fill."""
    old = model.quantize
    weights = (old.commit_weight, old.entropy_weight)
    model.quantize = type(old)(num_codes, old.embedding.embedding_dim, *weights)
    norm = old.embedding.weight.detach().norm(dim=-1).median()  # so that codes move as fast as before
    model.quantize.embedding.weight.data *= norm
    model.register_to_config(num_vq_embeddings=num_codes)


@torch.no_grad()
def refit_codebook(model: LlamaGenVQModel, batches: Iterable[dict], seed: int) -> None:
    """Fit a tokenizer's codebook to its encoder's outputs; all else stays.

    Args:
        model ([`LlamaGenVQModel`]): Changed in place.
        batches (`Iterable[dict]`): Batches of `images` in [-1, 1]; as many are read as have 64 cells a code.
        seed (`int`): Of the random choices.
    """
    weight, cells, count = model.quantize.embedding.weight, [], 0
    for batch in batches:
        cells.append(encode_cells(model, batch["images"].to(model.device)))
        count += len(cells[-1])
        if count >= CELLS_PER_CODE * len(weight):
            break
    codes = fit_codebook(torch.cat(cells), len(weight), torch.Generator().manual_seed(seed))
    weight.copy_(weight.norm(dim=-1).median() * codes)


@torch.no_grad()
def revive_codes(model: LlamaGenVQModel, counts: torch.Tensor, images: torch.Tensor) -> int:
    """Move each code with a zero count onto the encoder's output for a random cell of `images`.

    Args:
        model ([`LlamaGenVQModel`]): The tokenizer, changed in place.
        counts (`torch.Tensor` of shape `(codes,)`): How often each code was used.
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): Pixels in [-1, 1].

    Returns:
        `int`: How many codes were moved.
    """
    dead = (counts == 0).nonzero().flatten()
    z = encode_cells(model, images)
    dead = dead[torch.randperm(len(dead), device=dead.device)[: len(z)]]
    weight = model.quantize.embedding.weight
    norm = weight.norm(dim=-1).median()  # as long as its neighbours, so that it moves as fast as they do
    weight[dead] = norm * z[torch.randperm(len(z), device=z.device)[: len(dead)]]
    return len(dead)
