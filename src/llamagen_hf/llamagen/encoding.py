"""Prompts, classes and images as the transformer of a pipeline reads them, and its codes as images."""

import textwrap

import torch
from PIL import Image
from transformers.utils import logging

from ..conditioning.text import PromptLoss, encode_tokens, find_loss, tokenize_prompts
from ..images.reading import read_image
from ..images.transforms import center_crop, to_tensor
from ..reproducibility import in_own_precision
from .inputs import class_ids
from .preview import decode_partly


logger = logging.get_logger(__name__)


class EncodingMixin:
    """Encodes prompts, classes and images for the transformer of a pipeline, and decodes its codes."""

    def get_class_ids(self, class_labels: int | str | list[int | str] | torch.Tensor) -> torch.LongTensor:
        """Input ids `(batch,)` of classes given by id or by name; a `ValueError` names one that does not exist."""
        return class_ids(self.generator_config, class_labels)

    def class_names(self, class_labels: int | str | list[int | str]) -> list[str]:
        """The names of classes given by id or by name; the id itself where there is none."""
        ids, config = self.get_class_ids(class_labels) - self.generator_config.vocab_size, self.generator_config
        return [(config.id2label or {}).get(index, str(index)) for index in ids.tolist()]

    @torch.no_grad()
    @in_own_precision
    def encode_prompt(self, prompt: str | list[str]) -> tuple[torch.Tensor, torch.LongTensor]:
        """Clean, tokenize and encode prompts; a warning says of which nothing is left, and which are cut.

        Returns:
            What `__call__` takes as `prompt_embeds` `(batch, condition_length, condition_dim)` and
            `prompt_attention_mask` `(batch, condition_length)`. Padding is on the left and zero.
        """
        text_encoder, config = self.require("text_encoder", "which encodes prompts"), self.generator_config
        prompts = [prompt] if isinstance(prompt, str) else prompt
        self._warn_of_losses(prompts)
        input_ids, mask = tokenize_prompts(self.tokenizer, prompts, config.condition_length, config.prompt_cleaning)
        device = self._execution_device
        return encode_tokens(text_encoder, input_ids.to(device), mask.to(device), config.condition_length)

    def find_loss(self, prompt: str) -> PromptLoss | None:
        """What this checkpoint does not read of a prompt, see [`~llamagen_hf.conditioning.text.find_loss`]."""
        tokenizer, config = self.require("tokenizer", "which reads prompts"), self.generator_config
        return find_loss(tokenizer, prompt, config.condition_length, config.prompt_cleaning)

    def _warn_of_losses(self, prompts: list[str]) -> None:
        for prompt in prompts:
            if loss := self.find_loss(prompt):
                logger.warning_once(f"{loss.sentence} It is {textwrap.shorten(prompt, 200)!r}.")

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
            images = image if isinstance(image, list) else [image]
            crops = [center_crop(read_image(each), self.image_size) for each in images]
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
