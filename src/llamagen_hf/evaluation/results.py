"""What an evaluation found, as plain JSON: checked, and freed of paths of this machine."""

import json
import math
from pathlib import Path

from ..local_paths import local_places, public_name, public_value
from .metric import Metric, metric


NUMBER = (int, float)
# Keys of results that are shown in a place of their own.
ELSEWHERE = ("title", "task", "metrics", "sweep", "scores", "score_metric", "reference", "sampling", "versions")
SWEEP_COLUMNS = {"guidance_scale": Metric("guidance", "g"), "count": Metric("images", ",d")}
RENAMED = {"count": "images", "reference_count": "reference images", "top_k": "top-k", "top_p": "top-p"}


def check_results(results: dict) -> None:
    """See that results can be reported.

    Args:
        results (`dict`): As for [`~llamagen_hf.evaluation.report.write_report`].

    Raises:
        ValueError: In one sentence, if not.
    """
    if not isinstance(results, dict):
        raise ValueError("The results are no dict.")
    check_json(results, "results")
    metrics = results.get("metrics")
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError("The results hold no metrics; a report needs one at least.")
    check_numbers(metrics, "results['metrics']", metrics)
    for name in ("reference", "sampling", "versions"):
        if not isinstance(results.get(name, {}), dict):
            raise ValueError(f"results[{name!r}] is {results[name]!r}; expected a dict.")
    for place, counted in (("results", results), ("results['reference']", results.get("reference", {}))):
        check_numbers(counted, place, [name for name in ("count",) if counted.get(name) is not None])
    for name, needed in (("sweep", {"guidance_scale"}), ("scores", {"name", "score"})):
        for index, entry in enumerate(results.get(name) or []):
            place = f"results[{name!r}][{index}]"
            if not isinstance(entry, dict) or not needed <= entry.keys():
                raise ValueError(f"{place} is {entry!r}; expected a dict with {' and '.join(sorted(needed))}.")
            check_numbers(entry, place, entry.keys() - {"name"})


def check_json(value, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place} has the key {key!r}; JSON takes strings only.")
            check_json(item, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}; a report takes finite numbers only.")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{place} is of type {type(value).__name__}; a report takes plain JSON only.")


def check_numbers(values: dict, place: str, names) -> None:
    for name in names:
        if isinstance(values[name], bool) or not isinstance(values[name], NUMBER):
            raise ValueError(f"{place}[{name!r}] is {values[name]!r}; expected a number.")


def public_results(results: dict, folder: Path) -> dict:
    """The results as JSON gives them back, with names in place of paths of this machine.

    Args:
        results (`dict`): As for [`~llamagen_hf.evaluation.report.write_report`].
        folder (`Path`): Where the report will be.
    """
    results = public_value(json.loads(json.dumps(results)), local_places(folder))
    if results.get("checkpoint"):
        results["checkpoint"] = public_name(results["checkpoint"])
    return results


def metric_values(metrics: dict[str, float]) -> list[tuple[str, float, float | None]]:
    """Names, values and standard deviations of metrics: `kid` goes with `kid_std`."""
    return [
        (name, value, metrics.get(f"{name}_std"))
        for name, value in metrics.items()
        if not (name.endswith("_std") and name.removesuffix("_std") in metrics)
    ]


def title(results: dict) -> str:
    """What was evaluated, in a few words."""
    return results.get("title") or results.get("checkpoint") or "Evaluation"


def headline(results: dict) -> list[dict]:
    """The metrics as they are written."""
    return [
        {"metric": metric(name), "value": metric(name).write(value)}
        | {"std": None if deviation is None else metric(name).write(deviation)}
        for name, value, deviation in metric_values(results["metrics"])
    ]


def summary(results: dict) -> str:
    """What was evaluated and against what, in one sentence; empty if nothing of it is stated."""
    count, size, reference = results.get("count"), results.get("image_size"), results.get("reference", {})
    text = f"{count:,} images" if count else "Images"
    if size:
        width, height = (size, size) if isinstance(size, int) else size
        text += f" of {width} × {height} pixels"
    if reference.get("name"):
        of = f"the {reference['count']:,} of " if reference.get("count") else ""
        text += f", compared with {of}{reference['name']}"
    return "" if text == "Images" else f"{text}."


def caveats(results: dict) -> list[str]:
    """What a reader has to know before comparing the numbers with others."""
    found, count = list(results.get("reference", {}).get("caveats", [])), results.get("count")
    if count and count < 50_000 and "fid" in results["metrics"]:
        found.append(
            f"FID falls as the number of images grows (arXiv 1911.07023). This one is of {count:,}; compare it with "
            "others of as many only, not with the 50,000 of papers."
        )
    return found


def settings(results: dict) -> list[tuple[str, str]]:
    """Everything that is stated beside the numbers, as rows of names and values."""
    reference = {
        "reference" if name == "name" else f"reference_{name}": value
        for name, value in results.get("reference", {}).items()
        if name != "caveats"
    }
    versions = results.get("versions", {})
    stated = {name: value for name, value in results.items() if name not in ELSEWHERE}
    last = {name: stated.pop(name) for name in ("device", "date") if name in stated}
    rows = stated | results.get("sampling", {}) | reference | last
    rows = [(words(name), written(name, value)) for name, value in rows.items() if value is not None]
    if versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def words(name: str) -> str:
    """A key as a reader would say it."""
    return RENAMED.get(name) or name.replace("_", " ")


def written(name: str, value) -> str:
    """A setting as a reader would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("count"):
        return f"{value:,}"
    if isinstance(value, list):
        return (" × " if name == "image_size" else ", ").join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{words(key)} {item}" for key, item in value.items())
    return str(value)


def sweep_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what was measured at each guidance scale; both empty without a sweep."""
    sweep = sorted(results.get("sweep") or [], key=lambda point: point["guidance_scale"])
    names = dict.fromkeys(name for point in sweep for name, _, _ in metric_values(point))
    columns = {name: SWEEP_COLUMNS.get(name) or metric(name) for name in names}
    rows = [[sweep_cell(point, name, column) for name, column in columns.items()] for point in sweep]
    return [column.title for column in columns.values()], rows


def sweep_cell(point: dict, name: str, column: Metric) -> str:
    """A number of a sweep with its standard deviation, if there is one."""
    return " ± ".join(column.write(point[key]) for key in (name, f"{name}_std") if key in point)


def worst_and_best(results: dict, count: int = 6) -> tuple[list[dict], list[dict]]:
    """The `scores` at either end, the worst first and the best first; together no more than there are."""
    is_lower_better = metric(results.get("score_metric", "score")).better == "lower"
    ranked = sorted(results.get("scores") or [], key=lambda entry: entry["score"], reverse=is_lower_better)
    count = min(count, len(ranked) // 2)
    return ranked[:count], ranked[::-1][:count]
