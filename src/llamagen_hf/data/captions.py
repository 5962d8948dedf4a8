"""Captions of rows: templates that are filled with their columns."""

import random
import re
import string
from collections.abc import Iterator
from itertools import islice

from datasets import ClassLabel, Dataset, IterableDataset

from ..conditioning.text import clean_prompt
from .samples import BadRow


CORPUS_ROWS = 100_000  # enough to learn a small tokenizer's pairs from


class Captions:
    """Turns a row into a caption.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): The rows, for their columns and names of classes.
        templates (`dict[str, float]`): See [`write_caption`].
        cleaning (`str`, *optional*): Refuse captions of which this cleaning leaves nothing, see
            [`~llamagen_hf.conditioning.text.clean_prompt`].
        training (`bool`, *optional*, defaults to `True`): Draw a template; else take the first.

    Attributes:
        columns (`list[str]`): The columns that the templates name.

    Raises:
        ValueError: A column is missing.
    """

    def __init__(
        self,
        rows: Dataset | IterableDataset,
        templates: dict[str, float],
        cleaning: str | None = None,
        training: bool = True,
    ):
        self.templates = templates if training else {next(iter(templates)): 1.0}
        self.cleaning = cleaning
        self.names = {
            column: feature.names for column, feature in rows.features.items() if isinstance(feature, ClassLabel)
        }
        self.columns = sorted({column for template in self.templates for column in template_columns(template)})
        if missing := [column for column in self.columns if column not in rows.features]:
            raise ValueError(f"The rows have no column {missing[0]!r}; they have {', '.join(rows.features)}.")

    def __call__(self, row: dict, rng: random.Random) -> str:
        """The caption of a row; raises [`~llamagen_hf.data.samples.BadRow`] if nothing can be said of it."""
        for column in self.names.keys() & row.keys():
            label = row[column]
            row = row | {column: None if label is None or label < 0 else self.names[column][label]}
        caption = write_caption(row, self.templates, rng)
        if self.cleaning is not None and not clean_prompt(caption, self.cleaning):
            raise BadRow(f"nothing is left of the caption by prompt_cleaning {self.cleaning!r}")
        return caption


def write_caption(row: dict, templates: dict[str, float], rng: random.Random) -> str:
    """Fill one of several templates with a row's columns, so that a model sees an image under many descriptions.

    Args:
        row (`dict`): Columns by name. Of a list, one to three random entries are used.
        templates (`dict[str, float]`):
            Captions with names of columns in braces, and how often to draw each caption. An entry of a column that
            holds a mapping is `{json[caption]}`. Templates that name an empty column of this row are skipped.
        rng (`random.Random`): Source of the draws.

    Raises:
        ValueError: If a template names a column that does not exist.
        BadRow: If every template names an empty column.
    """
    usable = {}
    for template, weight in templates.items():
        names = template_columns(template)
        for name in names:
            if name not in row:
                raise ValueError(f"The caption template {template!r} names {name!r}; the columns are {sorted(row)}.")
        if not any(row[name] in (None, []) or str(row[name]).strip() == "" for name in names):
            usable[template] = weight
    if not usable:
        raise BadRow("no caption")
    (template,) = rng.choices(list(usable), weights=list(usable.values()))
    values = {name: row[name] for name in template_columns(template)}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = " ".join(rng.sample(value, rng.randint(1, min(3, len(value)))))
    return template.format(**values)


def template_columns(template: str) -> list[str]:
    """Names of the columns that a template uses."""
    return [re.split(r"[.\[]", name)[0] for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def caption_corpus(rows: Dataset | IterableDataset, templates: dict[str, float], seed: int) -> Iterator[str]:
    """Three captions of each of the first 100,000 rows, for a new text tokenizer to learn from.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): The training rows.
        templates (`dict[str, float]`): See [`write_caption`].
        seed (`int`): Seed of the draws.
    """
    captions, rng = Captions(rows, templates), random.Random(seed)
    for row in islice(rows.select_columns(captions.columns), CORPUS_ROWS):
        for _ in range(3):
            try:
                yield captions(row, rng)
            except BadRow:  # counted when the training reads it
                break
