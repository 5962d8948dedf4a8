"""The report of an evaluation as one page that needs nothing from elsewhere."""

import base64
import io
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from ..images.reading import read_image
from .metric import METRICS, metric
from .plots import Point, plot, templates
from .results import caveats, headline, settings, summary, sweep_table, title, worst_and_best


IMAGE_SIDE = 256  # of images on the page at most, in pixels

Picture = Image.Image | str | Path


def html_report(results: dict, sheet: list[tuple[str, str]], images: dict[str, list[Picture]]) -> str:
    """The page."""
    measure = metric(results.get("score_metric", "score"))
    groups = [
        (
            heading,
            [
                (entry["name"], measure.write(entry["score"]), list(map(data_uri, images.get(entry["name"], [])[:4])))
                for entry in entries
            ],
        )
        for heading, entries in zip(("Worst", "Best"), worst_and_best(results), strict=True)
        if entries
    ]
    return templates.get_template("report_template.html").render(
        title=title(results),
        summary=summary(results),
        preset=results.get("preset"),
        date=results.get("date"),
        headline=headline(results),
        caveats=caveats(results),
        plots=guidance_plots(results.get("sweep") or []),
        sweep_table=sweep_table(results),
        groups=groups[::-1],
        measure=measure,
        sheet=sheet,
        settings=settings(results),
        known=[METRICS[name] for name in results["metrics"] if name in METRICS],
        version=version("llamagen-hf"),
    )


def guidance_plots(sweep: list[dict]) -> list[tuple[str, str, str]]:
    """Plots of a sweep, each with its heading and a sentence on it, as far as it has the numbers."""
    sweep = sorted(sweep, key=lambda point: point["guidance_scale"])
    best = min((point for point in sweep if "fid" in point), key=lambda point: point["fid"], default=None)
    points = [
        Point(
            point["guidance_scale"],
            point["fid"],
            f"guidance scale {point['guidance_scale']:g}: FID {METRICS['fid'].write(point['fid'])}",
            METRICS["fid"].write(point["fid"]) if point is best else "",
            point is best,
        )
        for point in sweep
        if "fid" in point
    ]
    plots = []
    if len(points) > 1:
        svg = plot(points, "FID against guidance scale", "guidance scale", "FID ↓")
        note = f"Best: {METRICS['fid'].write(best['fid'])} at a guidance scale of {best['guidance_scale']:g}."
        plots.append(("FID against guidance", svg, note))
    points = [
        Point(
            point["recall"],
            point["precision"],
            f"guidance scale {point['guidance_scale']:g}: precision {METRICS['precision'].write(point['precision'])}, "
            f"recall {METRICS['recall'].write(point['recall'])}",
            f"{point['guidance_scale']:g}",
            point is best,
        )
        for point in sweep
        if "precision" in point and "recall" in point
    ]
    if len(points) > 1:
        svg = plot(points, "Precision against recall", "recall ↑", "precision ↑")
        note = "Numbers at points are guidance scales" + ("; the filled one has the best FID." if best else ".")
        plots.append(("Precision against recall", svg, note))
    return plots


def data_uri(picture: Picture) -> str:
    """An image within the page: small, and without what its file notes about itself."""
    image = read_image(picture)
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90, method=4, lossless=max(image.size) <= 128)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
