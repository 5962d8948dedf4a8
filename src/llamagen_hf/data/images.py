"""Pictures as training wants them: loaded by `datasets`, cropped, scaled to [-1, 1]."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from PIL import Image


@dataclass
class DataConfig:
    """Where the pictures are.

    Args:
        dataset (`str`): A Hub id, or a folder that `datasets.load_dataset` reads.
        train_split (`str`, *optional*, defaults to `"train"`): Split to learn from.
        test_split (`str`, *optional*, defaults to `"test"`): Split to measure on.
        image_column (`str`, *optional*, defaults to `"image"`): Column with the pictures.
        image_size (`int`, *optional*, defaults to 256): Side to crop and resize to, in pixels.
    """

    dataset: str = field(metadata={"help": "A Hub id, or a folder that `datasets.load_dataset` reads."})
    train_split: str = field(default="train", metadata={"help": "Split to learn from."})
    test_split: str = field(default="test", metadata={"help": "Split to measure on."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures."})
    image_size: int = field(default=256, metadata={"help": "Side to crop and resize to, in pixels."})

    def load(self, split: str) -> Dataset:
        """The dataset's `split`, map-style; a `ValueError` names a split, folder or column that is missing."""
        if "/" in self.dataset and self.dataset[0] in "./~" and not Path(self.dataset).expanduser().is_dir():
            raise ValueError(f"There is no folder {self.dataset!r}; `dataset` takes a folder or a Hub id.")
        dataset = load_dataset(str(Path(self.dataset).expanduser()), split=split)
        if self.image_column not in dataset.column_names:
            raise ValueError(f"The dataset has no column {self.image_column!r}; it has {dataset.column_names}.")
        return dataset


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shorter side to `size` and cut out the middle square, as ADM does.

    The picture is halved with a box filter while it is at least twice too large, then scaled bicubically
    (`center_crop_arr` of openai/guided-diffusion, also used by LlamaGen).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, crop_range: float) -> Image.Image:
    """Scale the shorter side to `crop_range * size`, as [`center_crop`] does, and cut out a random square."""
    image = center_crop(image, round(size * crop_range))
    left, top = torch.randint(image.width - size + 1, (2,)).tolist()
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as a `(3, height, width)` float tensor in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def image_tensors(dataset: Dataset, column: str, size: int) -> Dataset:
    """A view of `dataset` whose rows are `{"images": (3, size, size) tensor in [-1, 1]}`, decoded on access."""

    def transform(rows):
        return {"images": [to_tensor(center_crop(image, size)) for image in rows[column]]}

    return dataset.select_columns([column]).with_transform(transform)
