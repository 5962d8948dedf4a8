"""Plots of a few points as SVG that takes its colours from the page around it."""

import math
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader
from markupsafe import Markup


WIDTH, HEIGHT = 420, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 44, 44  # margins
LABEL = 40, 15  # room that a label takes

templates = Environment(
    loader=PackageLoader("llamagen_hf", "evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass
class Point:
    """A point of a plot.

    Args:
        x (`float`): In the unit of the horizontal axis.
        y (`float`): In the unit of the vertical axis.
        title (`str`): What is shown when a pointer rests on it.
        label (`str`): What is written beside it where there is room.
        is_marked (`bool`, *optional*, defaults to `False`): Whether it is the one to look at. Its label comes first.
    """

    x: float
    y: float
    title: str
    label: str = ""
    is_marked: bool = False


def plot(points: list[Point], title: str, x_label: str, y_label: str) -> Markup:
    """Draw points, and a line through them in the order given.

    Args:
        points (`list[Point]`): One at least.
        title (`str`): What the plot shows, for those who can't see it.
        x_label (`str`): What the horizontal axis measures, with its unit.
        y_label (`str`): The same for the vertical axis.

    Returns:
        `markupsafe.Markup`: An `<svg>` element, with classes that `report_template.html` styles.
    """
    x_ticks, y_ticks = ticks([point.x for point in points]), ticks([point.y for point in points])

    def across(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    places = [(across(point.x), up(point.y), point) for point in points]
    labels = []
    for x, y, point in sorted(places, key=lambda place: not place[2].is_marked):
        # Beside the point where the line does not go up to the right of it, else above it.
        neighbours = [place for place in zip(places, places[1:], strict=False) if (x, y, point) in place]
        is_beside = all(other_x <= x or other_y >= y for pair in neighbours for other_x, other_y, _ in pair)
        label = (x + 8, y - 6, "start") if is_beside else (x, y - 12, "middle")
        is_free = all(abs(label[0] - other[0]) > LABEL[0] or abs(label[1] - other[1]) > LABEL[1] for other in labels)
        if point.label and is_free:
            labels.append((*label, point.label))
    return Markup(
        templates.get_template("plot_template.svg").render(
            places=places,
            labels=labels,
            x_ticks=[(across(x), text) for x, text in zip(x_ticks, tick_texts(x_ticks), strict=True)],
            y_ticks=[(up(y), text) for y, text in zip(y_ticks, tick_texts(y_ticks), strict=True)],
            title=title,
            x_label=x_label,
            y_label=y_label,
            width=WIDTH,
            height=HEIGHT,
            left=LEFT,
            right=WIDTH - RIGHT,
            bottom=HEIGHT - BOTTOM,
        )
    )


def ticks(values: list[float], count: int = 5) -> list[float]:
    """About `count` round numbers, evenly spaced, from below the least value to above the greatest."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_texts(values: list[float]) -> list[str]:
    """Ticks with as many decimals as their step has."""
    decimals = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]
