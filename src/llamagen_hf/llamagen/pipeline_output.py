"""What the pipeline returns and yields."""

from dataclasses import dataclass

import torch

from ..outputs import GenerationStep as GenerationStep
from ..outputs import SavableOutput
from ..reranking import Candidate


@dataclass
class AutoregressiveImageOutput(SavableOutput):
    """What [`AutoregressiveImagePipeline`] returns.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Images in the output type, by prompt.
        codes (`torch.LongTensor` of shape `(batch, grid_size, grid_size)`): Their codes.
        parameters (`list[dict]`): For each image what made it: its prompt or class, settings, seed, checkpoint, and
            the codes that were kept. [`AutoregressiveImagePipeline.redraw`] draws it again from them.
        candidates (`list[list[Candidate]]`, *optional*): For each image all of its candidates, best first.
    """

    codes: torch.LongTensor | None = None
    parameters: list[dict] | None = None
    candidates: list[list[Candidate]] | None = None
