"""Results of an evaluation as plain JSON: checked, freed of local paths, and written for readers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ...local_paths import local_places, public_name, public_value


@dataclass(frozen=True)
class Metric:
    """What a reader has to know about a metric.

    Args:
        label (`str`): Its usual name.
        spec (`str`, *optional*, defaults to `".4g"`): Format of its values, as for `format`.
        better (`str`, *optional*): `"lower"` or `"higher"`.
        about (`str`, *optional*): What it measures, in one sentence.
        arxiv (`str`, *optional*): The paper that defines it.
        scale (`float`, *optional*, defaults to 1): Factor that values are multiplied by when written.
    """

    label: str
    spec: str = ".4g"
    better: str | None = None
    about: str = ""
    arxiv: str | None = None
    scale: float = 1

    @property
    def arrow(self) -> str:
        """The direction of better values: `"↓"`, `"↑"` or nothing."""
        return {"lower": "↓", "higher": "↑", None: ""}[self.better]

    @property
    def title(self) -> str:
        """The label with its arrow."""
        return f"{self.label} {self.arrow}".strip()

    def write(self, value: float) -> str:
        """A value, or a standard deviation, as readers expect it."""
        return format(value * self.scale, self.spec)


METRICS = {
    "fid": Metric(
        "FID", ".2f", "lower", "Distance between the Inception features of samples and reference.", "1706.08500"
    ),
    "sfid": Metric("sFID", ".2f", "lower", "FID of features that keep positions.", "2103.03841"),
    "inception_score": Metric(
        "Inception Score", ".1f", "higher",
        "How confident a classifier is about each sample, and how many classes it finds.", "1606.03498",
    ),
    "precision": Metric(
        "Precision", ".3f", "higher", "Share of the samples that lie among the reference.", "1904.06991"
    ),
    "recall": Metric("Recall", ".3f", "higher", "Share of the reference that lies among the samples.", "1904.06991"),
    "kid": Metric(
        "KID × 10³", ".2f", "lower", "Squared maximum mean discrepancy of Inception features, without FID's bias.",
        "1801.01401", 1000,
    ),
    "clip_score": Metric(
        "CLIP score", ".2f", "higher", "Cosine between the CLIP embeddings of a prompt and its image, times 100.",
        "2104.08718",
    ),
    "r_precision": Metric(
        "R-precision", ".1%", "higher", "Share of the images whose own prompt CLIP finds among others.", "1711.10485"
    ),
    "rfid": Metric("rFID", ".2f", "lower", "FID of reconstructed images against the originals.", "1706.08500"),
    "psnr": Metric("PSNR (dB)", ".2f", "higher", "Peak signal-to-noise ratio of reconstructed images."),
    "ssim": Metric("SSIM", ".3f", "higher", "Structural similarity of reconstructed images."),
    "lpips": Metric(
        "LPIPS", ".3f", "lower", "Perceptual distance of reconstructed images from the originals.", "1801.03924"
    ),
    "codebook_usage": Metric("Codes in use", ".1%", "higher", "Share of the codebook that the images use."),
    "codebook_perplexity": Metric(
        "Code perplexity", ",.0f", "higher", "Number of equally frequent codes with the same entropy."
    ),
}  # fmt: skip

# Keys of results that have a place of their own in reports.
ELSEWHERE = ("title", "task", "metrics", "sweep", "scores", "score_metric", "reference", "sampling", "versions")
SWEEP_COLUMNS = {"guidance_scale": Metric("guidance", "g"), "count": Metric("images", ",d")}
RENAMED = {"count": "images", "reference_count": "reference images", "top_k": "top-k", "top_p": "top-p"}


def metric(name: str) -> Metric:
    """The metric of this name; an unknown one has nothing but its name."""
    return METRICS.get(name) or Metric(name.replace("_", " "))


def score_metric(results: dict) -> Metric:
    """The metric of the `scores`."""
    return metric(results.get("score_metric", "score"))


def check_results(results: dict) -> None:
    """Raise a `ValueError` if results are not what [`~llamagen_hf.evaluation.report.write_report`] takes."""
    if not isinstance(results, dict):
        raise ValueError("The results are not a dict.")
    _check_json(results, "results")
    metrics = results.get("metrics")
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError("The results hold no metrics; a report needs at least one.")
    _check_numbers(metrics, "results['metrics']", metrics)
    for name in ("reference", "sampling", "versions"):
        if not isinstance(results.get(name, {}), dict):
            raise ValueError(f"results[{name!r}] is {results[name]!r}; expected a dict.")
    for place, counted in (("results", results), ("results['reference']", results.get("reference", {}))):
        if counted.get("count") is not None:
            _check_numbers(counted, place, ["count"])
    for name, needed in (("sweep", {"guidance_scale"}), ("scores", {"name", "score"})):
        for index, entry in enumerate(results.get(name) or []):
            place = f"results[{name!r}][{index}]"
            if not isinstance(entry, dict) or not needed <= entry.keys():
                raise ValueError(f"{place} is {entry!r}; expected a dict with {' and '.join(sorted(needed))}.")
            _check_numbers(entry, place, entry.keys() - {"name"})


def _check_json(value, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place} has the key {key!r}; JSON takes strings only.")
            _check_json(item, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{place}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}; a report takes finite numbers only.")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{place} is of type {type(value).__name__}; a report takes plain JSON only.")


def _check_numbers(values: dict, place: str, names) -> None:
    for name in names:
        if isinstance(values[name], bool) or not isinstance(values[name], int | float):
            raise ValueError(f"{place}[{name!r}] is {values[name]!r}; expected a number.")


def public_results(results: dict, folder: Path) -> dict:
    """The results of a report in `folder` after a round trip through JSON, with names in place of local paths."""
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
    """Each `metric` with its `value` and, if there is one, its standard deviation `std` as text."""
    found = [(metric(name), value, deviation) for name, value, deviation in metric_values(results["metrics"])]
    return [
        {"metric": shown, "value": shown.write(value), "std": None if deviation is None else shown.write(deviation)}
        for shown, value, deviation in found
    ]


def summary(results: dict) -> str:
    """One sentence on what was evaluated against what; empty if neither is stated."""
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
            f"FID falls as the number of images grows (arXiv 1911.07023). This one is computed from {count:,}; "
            "compare it only with FIDs of equally many images, not with the 50,000 of papers."
        )
    return found


def settings(results: dict) -> list[tuple[str, str]]:
    """All settings stated beside the numbers, as rows of names and values."""
    reference = {
        "reference" if name == "name" else f"reference_{name}": value
        for name, value in results.get("reference", {}).items()
        if name != "caveats"
    }
    stated = {name: value for name, value in results.items() if name not in ELSEWHERE}
    last = {name: stated.pop(name) for name in ("device", "date") if name in stated}
    rows = stated | results.get("sampling", {}) | reference | last
    rows = [
        (RENAMED.get(name) or name.replace("_", " "), _written(name, value))
        for name, value in rows.items()
        if value is not None
    ]
    if versions := results.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return rows


def _written(name: str, value) -> str:
    """A setting as a reader would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("count"):
        return f"{value:,}"
    if isinstance(value, list):
        return (" × " if name == "image_size" else ", ").join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {item}" for key, item in value.items())
    return str(value)


def sweep_table(results: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of what was measured at each guidance scale; both empty without a sweep."""
    sweep = sorted(results.get("sweep") or [], key=lambda point: point["guidance_scale"])
    names = dict.fromkeys(name for point in sweep for name, _, _ in metric_values(point))
    columns = {name: SWEEP_COLUMNS.get(name) or metric(name) for name in names}
    rows = [
        [
            " ± ".join(column.write(point[key]) for key in (name, f"{name}_std") if key in point)
            for name, column in columns.items()
        ]
        for point in sweep
    ]
    return [column.title for column in columns.values()], rows


def worst_and_best(results: dict, count: int = 6) -> tuple[list[dict], list[dict]]:
    """The `count` worst of the `scores`, worst first, and the `count` best, best first; none is in both."""
    is_lower_better = score_metric(results).better == "lower"
    ranked = sorted(results.get("scores") or [], key=lambda entry: entry["score"], reverse=is_lower_better)
    count = min(count, len(ranked) // 2)
    return ranked[:count], ranked[::-1][:count]
