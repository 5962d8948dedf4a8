"""The report of an evaluation as one page that loads nothing, with plots as SVG."""

import base64
import io
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image

from ...images.reading import read_image
from .results import METRICS, caveats, headline, score_metric, settings, summary, sweep_table, title, worst_and_best


IMAGE_SIDE = 256  # longest side of images on the page, in pixels
WIDTH, HEIGHT = 420, 290  # of a plot
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 44, 44  # its margins
LABEL = 40, 15  # space that a label takes

ImageSource = Image.Image | str | Path

templates = Environment(
    loader=PackageLoader("llamagen_hf", "evaluation/report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def html_report(results: dict, sheet: list[tuple[str, str]], images: dict[str, list[ImageSource]]) -> str:
    """The page, with a sheet of samples (data URIs and captions), and images by the name of a score."""

    def with_images(entry: dict) -> tuple[str, str, list[str]]:
        shown = [data_uri(image) for image in images.get(entry["name"], [])[:4]]
        return entry["name"], score_metric(results).write(entry["score"]), shown

    worst, best = (list(map(with_images, entries)) for entries in worst_and_best(results))
    return templates.get_template("report_template.html").render(
        **{part.__name__: part(results) for part in (title, summary, headline, caveats, settings, sweep_table)},
        preset=results.get("preset"),
        date=results.get("date"),
        plots=_guidance_plots(results.get("sweep") or []),
        groups=[("Best", best), ("Worst", worst)] if best else [],
        measure=score_metric(results),
        sheet=sheet,
        known=[METRICS[name] for name in results["metrics"] if name in METRICS],
        version=version("llamagen-hf"),
    )


def data_uri(source: ImageSource) -> str:
    """An image to embed in the page: small, and without the metadata of its file."""
    image = read_image(source)
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90, method=4, lossless=max(image.size) <= 128)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _guidance_plots(sweep: list[dict]) -> list[tuple[str, str, str]]:
    """The plots of a sweep that it has numbers for, each with its heading and a sentence on it."""
    sweep = sorted(sweep, key=lambda point: point["guidance_scale"])
    best = min((point for point in sweep if "fid" in point), key=lambda point: point["fid"], default=None)
    write_fid, write_share = METRICS["fid"].write, METRICS["precision"].write
    fids, shares, plots = [], [], []
    for point in sweep:
        scale, is_best = f"{point['guidance_scale']:g}", point is best
        if "fid" in point:
            fid = write_fid(point["fid"])
            tooltip = f"guidance scale {scale}: FID {fid}"
            fids.append(Point(point["guidance_scale"], point["fid"], tooltip, fid if is_best else "", is_best))
        if "precision" in point and "recall" in point:
            precision, recall = write_share(point["precision"]), write_share(point["recall"])
            tooltip = f"guidance scale {scale}: precision {precision}, recall {recall}"
            shares.append(Point(point["recall"], point["precision"], tooltip, scale, is_best))
    if len(fids) > 1:
        svg = plot(fids, "FID against guidance scale", "guidance scale", "FID ↓")
        note = f"Best: {write_fid(best['fid'])} at a guidance scale of {best['guidance_scale']:g}."
        plots.append(("FID against guidance", svg, note))
    if len(shares) > 1:
        svg = plot(shares, "Precision against recall", "recall ↑", "precision ↑")
        note = "Numbers at points are guidance scales" + ("; the filled one has the best FID." if best else ".")
        plots.append(("Precision against recall", svg, note))
    return plots


@dataclass
class Point:
    """A point of a plot."""

    x: float
    y: float
    title: str  # tooltip
    label: str = ""  # beside the point, left out where there is no space
    is_marked: bool = False  # filled, with its label placed first


def plot(points: list[Point], title: str, x_label: str, y_label: str) -> Markup:
    """Points, and a line through them in the given order, as an `<svg>` that `report_template.html` styles.

    The title is for screen readers.
    """
    x_ticks, y_ticks = ticks([point.x for point in points]), ticks([point.y for point in points])

    def across(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    places = [(across(point.x), up(point.y), point) for point in points]
    labels = []
    for x, y, point in sorted(places, key=lambda place: not place[2].is_marked):
        # Beside the point where the line does not rise to the right of it, else above it.
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
    """About `count` round numbers, evenly spaced, from at most the least value to at least the greatest."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_texts(values: list[float]) -> list[str]:
    """Ticks written with as many decimals as their step has."""
    decimals = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    return [f"{value:,.{decimals}f}" for value in values]
