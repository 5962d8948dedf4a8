"""What the pipeline returns and yields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..provenance import save_png
from ..reranking import Candidate


@dataclass
class AutoregressiveImageOutput(ImagePipelineOutput):
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

    def save(self, path: str | Path) -> list[Path]:
        """Write the images as PNG, each with its parameters in the text chunk "parameters".

        Args:
            path (`str` or `os.PathLike`): The file. Several images are numbered: `apple-0.png`, `apple-1.png`, ...

        Returns:
            `list[Path]`: The files.

        Raises:
            ValueError: If the images are not PIL images, or a file can't be written.
        """
        if not isinstance(self.images, list):
            raise ValueError("Only PIL images can be saved; draw with output_type='pil'.")
        path = Path(path)
        paths = [path.with_stem(f"{path.stem}-{i}") for i in range(len(self.images))]
        if len(self.images) == 1:
            paths = [path]
        for image, target, parameters in zip(self.images, paths, self.parameters, strict=True):
            save_png(image, target, parameters)
        return paths


@dataclass
class GenerationStep:
    """A moment of a generation, see [`AutoregressiveImagePipeline.stream`].

    Args:
        step (`int`): How far it is: codes of an image so far.
        num_steps (`int`): Codes of a whole image.
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): Previews in the output type; in the last step
            the images themselves.
        codes (`torch.LongTensor` of shape `(batch, step)`): The codes so far, in raster order.
        output ([`AutoregressiveImageOutput`], *optional*): The result, in the last step.
    """

    step: int
    num_steps: int
    images: Any
    codes: torch.LongTensor
    output: AutoregressiveImageOutput | None = None
