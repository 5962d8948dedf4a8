"""Captions made from a row's columns, so that a model sees one picture under many descriptions."""

import random
import string


def write_caption(row: dict, templates: dict[str, float], rng: random.Random) -> str:
    """Fill one template with a row's columns.

    Args:
        row (`dict`): Columns by name. Of a list, one to three entries are drawn.
        templates (`dict[str, float]`): Captions with columns' names in braces, and how often to draw each of them.
        rng (`random.Random`): Source of the draws.

    Raises:
        ValueError: If a template names a column that is not there.
    """
    usable = {
        template: weight
        for template, weight in templates.items()
        if all(row.get(name, "") != [] for name in _columns(template))  # an empty list has nothing to draw from
    }
    (template,) = rng.choices(list(usable), weights=list(usable.values()))
    values = {}
    for name in _columns(template):
        if name not in row:
            raise ValueError(f"The caption template {template!r} names {name!r}; the columns are {sorted(row)}.")
        value = row[name]
        values[name] = (
            " ".join(rng.sample(value, rng.randint(1, min(3, len(value))))) if type(value) is list else value
        )
    return template.format(**values)


def _columns(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
