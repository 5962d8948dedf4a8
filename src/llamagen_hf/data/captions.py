"""Captions made from a row's columns, so that a model sees one image under many descriptions."""

import random
import re
import string

from .bad_rows import BadRow


def write_caption(row: dict, templates: dict[str, float], rng: random.Random) -> str:
    """Fill one template with a row's columns.

    Args:
        row (`dict`): Columns by name. Of a list, one to three entries are drawn.
        templates (`dict[str, float]`):
            Captions with columns' names in braces, and how often to draw each of them. A column that holds a mapping
            can be looked into: `{json[caption]}`. Templates that name an empty column of this row are passed over.
        rng (`random.Random`): Source of the draws.

    Raises:
        ValueError: If a template names a column that is not there.
        BadRow: If all templates name an empty column.
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
    values = {}
    for name in template_columns(template):
        value = row[name]
        if isinstance(value, list):
            value = " ".join(rng.sample(value, rng.randint(1, min(3, len(value)))))
        values[name] = value
    return template.format(**values)


def template_columns(template: str) -> list[str]:
    """Names of the columns that a template is filled with."""
    return [re.split(r"[.\[]", name)[0] for _, name, _, _ in string.Formatter().parse(template) if name is not None]
