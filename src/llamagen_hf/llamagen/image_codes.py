"""Images to codes and back, as methods of a pipeline."""

import torch
from PIL import Image

from ..images.reading import read_image
from ..images.transforms import center_crop, to_tensor
from .decoding import in_own_precision
from .preview import decode_partly


class ImageCodesMixin:
    """What the `vq_model` of a pipeline does for it."""

    @torch.no_grad()
    @in_own_precision
    def preview(self, codes: torch.LongTensor, output_type: str = "pil"):
        """Show images of which only the first codes are drawn, such as a callback gets; the rest is a light grey.

        Args:
            codes (`torch.LongTensor` of shape `(batch, n)`): The codes so far, in raster order.
            output_type (`str`, *optional*, defaults to `"pil"`): As for [`AutoregressiveImagePipeline.__call__`].

        Returns:
            Images in the output type; for `"codes"` the codes.
        """
        if output_type == "codes":
            return codes
        vq_model = self.require("vq_model", "which turns codes into images")
        images = decode_partly(vq_model, codes, self.generator_config.grid_size)
        return self.image_processor.postprocess(images, output_type=output_type)

    @torch.no_grad()
    def draw_pixels(self, **kwargs) -> torch.Tensor:
        """Draw images to measure: their pixels before they are clamped, since the released code scales images first.

        Args:
            kwargs: As for [`AutoregressiveImagePipeline.__call__`], bar `output_type` and `return_dict`.

        Returns:
            `torch.Tensor` of shape `(batch, 3, height, width)`: float32, nominally in [-1, 1].
        """
        codes = self(**kwargs, output_type="codes").images
        return torch.cat([self.vq_model.decode_codes(grid[None]) for grid in codes]).float()

    @torch.no_grad()
    @in_own_precision
    def encode_image(self, image: Image.Image | list[Image.Image] | torch.Tensor) -> torch.LongTensor:
        """Turn images into codes.

        Args:
            image (`PIL.Image.Image`, `list[PIL.Image.Image]` or `torch.Tensor`):
                Images are read by [`~llamagen_hf.images.reading.read_image`], so upright and on white, and cropped
                to their middle square. A tensor is `(batch, 3, image_size, image_size)` in [0, 1].

        Returns:
            `torch.LongTensor` of shape `(batch, grid_size, grid_size)`: The codes.
        """
        vq_model = self.require("vq_model", "which turns images into codes")
        if isinstance(image, torch.Tensor):
            pixels = 2 * image - 1
        else:
            pictures = image if isinstance(image, list) else [image]
            crops = [center_crop(read_image(picture), self.image_size) for picture in pictures]
            pixels = torch.stack([to_tensor(crop) for crop in crops])
        return vq_model.encode(pixels.to(self._execution_device, vq_model.dtype)).codes

    @torch.no_grad()
    @in_own_precision
    def decode_codes(self, codes: torch.LongTensor, output_type: str = "pil"):
        """Turn codes into images, the way back from [`encode_image`].

        Args:
            codes (`torch.LongTensor` of shape `(batch, grid_size, grid_size)`): The codes.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"`, as for [`AutoregressiveImagePipeline.__call__`].
        """
        vq_model, codes = self.require("vq_model", "which turns codes into images"), codes.to(self._execution_device)
        # On a CPU a batch saves little, and its size changes the last bits of every image in it.
        batches = codes.split(1) if codes.device.type == "cpu" else [codes]
        pixels = torch.cat([vq_model.decode_codes(batch) for batch in batches])
        return self.image_processor.postprocess(pixels, output_type=output_type)
