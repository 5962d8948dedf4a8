"""How often codes are used, and what is done with those that are not."""

import torch
import torch.nn.functional as F

from ..vq_model import LlamaGenVQModel


class CodeCounts:
    """How often each code was used since the counts were last cleared; a part of a run's checkpoints."""

    def __init__(self, num_codes: int, device: torch.device):
        self.counts = torch.zeros(num_codes, dtype=torch.long, device=device)

    def add(self, codes: torch.LongTensor) -> None:
        self.counts += codes.flatten().bincount(minlength=len(self.counts))

    @property
    def usage(self) -> float:
        """Share of the codes that were used, in [0, 1]."""
        return (self.counts > 0).float().mean().item()

    @property
    def perplexity(self) -> float:
        """Exponential of the entropy of use: as many codes, all equally often, would carry as much."""
        share = self.counts / self.counts.sum()
        return torch.special.entr(share).sum().exp().item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.counts.copy_(state["counts"])


@torch.no_grad()
def revive_codes(model: LlamaGenVQModel, counts: torch.Tensor, images: torch.Tensor) -> int:
    """Move each code with a zero count onto the encoder's output for a random cell of `images`.

    Returns:
        `int`: How many codes were moved.
    """
    dead = (counts == 0).nonzero().flatten()
    z = F.normalize(model.quant_conv(model.encoder(images)).permute(0, 2, 3, 1).flatten(0, 2).float(), dim=-1)
    dead = dead[torch.randperm(len(dead), device=dead.device)[: len(z)]]
    weight = model.quantize.embedding.weight
    norm = weight.norm(dim=-1).median()  # as long as its neighbours, so that it moves as fast as they do
    weight[dead] = norm * z[torch.randperm(len(z), device=z.device)[: len(dead)]]
    return len(dead)
