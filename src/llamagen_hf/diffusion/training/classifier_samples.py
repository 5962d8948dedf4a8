"""Rows as samples of a classifier training: an image, its class, and the noise that is drawn for it."""

import random

from datasets import ClassLabel, Dataset, IterableDataset, Value

from ...data.samples import BadRow, ImageSamples
from ..schedules import NUM_TIMESTEPS
from .diffusion_samples import image_random


class Labels:
    """Turns a row into a class id.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): The training rows, which say what classes there are.
        column (`str`): Column of type `ClassLabel`, or with names as strings.

    Attributes:
        names (`list[str]`): Names of the classes, by id; those of strings are in alphabetical order.

    Raises:
        ValueError: There is no such column, or it does not say what classes there are.
    """

    def __init__(self, rows: Dataset | IterableDataset, column: str):
        if column not in rows.features:
            raise ValueError(f"The rows have no column {column!r}; they have {', '.join(rows.features)}.")
        feature, self.column = rows.features[column], column
        if isinstance(feature, ClassLabel):
            self.names = feature.names
        elif feature not in (Value("string"), Value("large_string")):
            raise ValueError(f"The column {column!r} holds {feature}; expected names, or ids with names (ClassLabel).")
        elif isinstance(rows, IterableDataset):
            raise ValueError(f"The column {column!r} of a stream does not say what classes there are; use ClassLabel.")
        else:
            self.names = sorted(name for name in rows.unique(column) if name is not None and name.strip())
        if len(self.names) < 2:
            raise ValueError(f"The column {column!r} has {len(self.names)} classes; expected at least 2.")
        self.ids = {name: index for index, name in enumerate(self.names)}

    def __call__(self, row: dict) -> int:
        """The class id of a row; raises [`~llamagen_hf.data.samples.BadRow`] if it has none."""
        value = row[self.column]
        index = self.ids.get(value, -1) if isinstance(value, str) else value
        if index is None or not 0 <= index < len(self.names):
            raise BadRow(f"no class: {value!r} is none of the training's classes")
        return index


class ClassifierSamples:
    """Turns a row into a sample.

    The noise is drawn here, as a seed, so that it does not depend on micro-batch, process or step. A test row always
    has the same draws.

    Args:
        images ([`~llamagen_hf.data.samples.ImageSamples`]): Makes the images.
        labels ([`Labels`]): Says their classes.
        training (`bool`, *optional*, defaults to `True`): Else a row always has the same draws.
    """

    def __init__(self, images: ImageSamples, labels: Labels, training: bool = True):
        self.images, self.labels, self.training = images, labels, training
        self.columns = list(dict.fromkeys([images.data.image_column, labels.column]))

    def __call__(self, row: dict, rng: random.Random) -> dict:
        """`images` `(3, size, size)` in [-1, 1], `class_labels`, and the `seeds` of their noise and `timesteps`.

        Raises:
            BadRow: If there is no usable image or no class.
        """
        sample = {"class_labels": self.labels(row)} | self.images(row, rng)
        if not self.training:
            rng = image_random(sample["images"])
        return sample | {"seeds": rng.getrandbits(63), "timesteps": rng.randrange(NUM_TIMESTEPS)}
