"""Pictures as tensors: what the tokenizer learns from."""

import random

import torch
from PIL import Image

from .picture_files import decode_picture
from .source import DataConfig
from .transforms import center_crop, random_crop, to_tensor


class PictureSamples:
    """Turns a row into a square picture.

    Args:
        data ([`DataConfig`]): Column and size of the pictures.
        crop (`str`, *optional*, defaults to `"center"`): `"center"` or `"random"`.
        flip (`bool`, *optional*, defaults to `False`): Mirror half of the pictures.
    """

    def __init__(self, data: DataConfig, crop: str = "center", flip: bool = False):
        if crop not in ("center", "random"):
            raise ValueError(f"crop is {crop!r}; expected 'center' or 'random'.")
        self.data = data
        self.crop = crop
        self.flip = flip

    def __call__(self, row: dict, rng: random.Random) -> dict[str, torch.Tensor]:
        """`images`: `(3, image_size, image_size)` in [-1, 1].

        Raises:
            BadRow: If there is no usable picture.
        """
        image = decode_picture(row[self.data.image_column], self.data.min_image_size)
        size = self.data.image_size
        image = center_crop(image, size) if self.crop == "center" else random_crop(image, size, rng)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return {"images": to_tensor(image)}


def stack_pictures(samples: list[dict]) -> dict[str, torch.Tensor]:
    """`images` as one tensor `(batch, 3, image_size, image_size)`."""
    return {"images": torch.stack([sample["images"] for sample in samples])}
