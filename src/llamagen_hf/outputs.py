"""What the pipelines of all families return and yield."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from .provenance import save_png


class SavableOutput(ImagePipelineOutput):
    """Images with the parameters of each; a base class of the families' outputs, which have `parameters`."""

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
    """A moment of a generation, which the `stream` of a pipeline yields.

    Args:
        step (`int`): How far it is: steps so far, or codes of an image.
        num_steps (`int`): Steps of the whole generation, or codes of a whole image.
        codes (`torch.LongTensor` of shape `(batch, step)`, *optional*):
            The codes so far, in raster order, if images are drawn code by code.
        preview (`Callable`, *optional*): Makes the images as they are so far, bar in the last step.
        output ([`SavableOutput`], *optional*): The result, in the last step.
    """

    step: int
    num_steps: int
    codes: torch.LongTensor | None = None
    preview: Callable[[], Any] | None = None
    output: SavableOutput | None = None

    @cached_property
    def images(self) -> Any:
        """Previews in the output type (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`), made when they are
        first looked at; in the last step the images themselves."""
        return self.preview() if self.output is None else self.output.images
