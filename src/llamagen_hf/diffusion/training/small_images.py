"""The small images that an upsampler learns from."""

import torch

from ...autoencoders import load_vq_model
from ...evaluation.upsampling import reduce_images


class SmallImages:
    """Makes small images as an upsampler will get them: reduced, or as a base's image decoder draws them.

    An upsampler that has seen reduced images only takes the faults of a base's decoder for details, and sharpens them.

    Args:
        size (`int`): Side of the small images, in pixels.
        image_size (`int`): Side of the large ones, a multiple of it.
        vq_model (`str`, *optional*): Folder or Hub id of an image tokenizer, or `"emoji"`.
        device (`torch.device`, *optional*): Where it runs.

    Raises:
        ValueError: The sizes do not fit, or there is no such tokenizer.
    """

    def __init__(self, size: int, image_size: int, vq_model: str | None = None, device: torch.device | None = None):
        if not 0 < size < image_size or image_size % size:
            raise ValueError(
                f"low_image_size is {size}; expected a part of image_size ({image_size}), such as half of it."
            )
        self.size, self.image_size = size, image_size
        self.vq_model = None if vq_model is None else load_vq_model(vq_model).to(device).requires_grad_(False)
        if self.vq_model is not None and size % self.vq_model.downsample_factor:
            raise ValueError(
                f"low_image_size is {size}, but low_vq_model takes multiples of {self.vq_model.downsample_factor}."
            )

    @property
    def factor(self) -> int:
        """How many times larger the large images are."""
        return self.image_size // self.size

    def reduce(self, images: torch.Tensor) -> torch.Tensor:
        """Means over squares of pixels, as [`~llamagen_hf.images.transforms.center_crop`] halves an image."""
        return reduce_images(images, self.size)

    @torch.no_grad()
    def redraw(self, small: torch.Tensor) -> torch.Tensor:
        """Encode and decode small images."""
        pixels = self.vq_model.decode(self.vq_model.encode(small).quantized).sample
        return pixels.to(small.dtype).clamp(-1, 1)

    def __call__(self, images: torch.Tensor, redrawn: torch.Tensor) -> torch.Tensor:
        """The small images of large ones.

        Args:
            images (`torch.Tensor` of shape `(batch, 3, image_size, image_size)`): Images in [-1, 1].
            redrawn (`torch.BoolTensor` of shape `(batch,)`): Which of their small images are redrawn.

        Returns:
            `torch.Tensor` of shape `(batch, 3, size, size)`: In [-1, 1].
        """
        small = self.reduce(images)
        if redrawn.any():
            small[redrawn] = self.redraw(small[redrawn])
        return small
