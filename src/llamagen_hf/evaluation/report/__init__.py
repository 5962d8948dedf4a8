"""The report of an evaluation: JSON for programs, Markdown for papers, a page for people."""

import json
import shutil
from pathlib import Path

from huggingface_hub import EvalResult

from ...files import replace_result
from ...local_paths import local_places, public_text
from .html import ImageSource, data_uri, html_report
from .markdown import markdown_report
from .results import check_results, metric, metric_values, public_results


# Paths in the folder of a checkpoint, and in its repository.
REPORT = "evaluation/report.json"
REPORT_FILES = (REPORT, "evaluation/report.md", "evaluation/report.html")


def write_report(
    folder: str | Path,
    results: dict,
    samples: list[tuple[ImageSource, str]] | None = None,
    score_images: dict[str, list[ImageSource]] | None = None,
) -> Path:
    """Write the results of an evaluation as `report.json`, `report.md` and `report.html`, all of them or none.

    The page is one file without scripts that loads nothing. In all three files, local paths are replaced by their last
    name. A report in the folder `evaluation` beside a checkpoint is published with it.

    Args:
        folder (`str` or `os.PathLike`): Where to write; created if missing. An existing report is replaced.
        results (`dict`): Plain JSON. Only `metrics` is required, and more settings may be added.

            - `metrics`: numbers by name, such as those of
              [`~llamagen_hf.evaluation.statistics.evaluate_generation`]; `<name>_std` is a standard deviation.
            - `title`, `checkpoint`, `revision`, `preset`, `count`, `image_size` (a side, or width and height),
              `features`, `device`, `date`: what was evaluated. `task` is the Hub's name of its task,
              `"text-to-image"` by default.
            - `sampling`, `versions`: settings and library versions by name.
            - `reference`: its `name`, `count` and `caveats`, a list of sentences.
            - `sweep`: a list of `{"guidance_scale": ..., "fid": ..., "precision": ..., "recall": ..., ...}`.
            - `scores`: a list of `{"name": ..., "score": ...}`, one for each class or prompt; `score_metric` names the
              metric of the scores, which decides whether low or high ones are good.
        samples (`list[tuple[Image, str]]`, *optional*): Images for the sheet, open or as files, with captions.
        score_images (`dict[str, list[Image]]`, *optional*): Images of the classes or prompts in `scores`.

    Returns:
        `Path`: The page.

    Raises:
        ValueError: If the results are not plain JSON, hold a number that is not finite, lack metrics, or if an image
            can't be read.
        OSError: If the report can't be written.

    Example:

    ```python
    >>> from llamagen_hf.evaluation.report import write_report

    >>> results = {"checkpoint": "user/model", "count": 50_000, "metrics": {"fid": 2.18, "precision": 0.81}}
    >>> page = write_report("evaluation", results)  # doctest: +SKIP
    ```
    """
    check_results(results)
    folder = Path(folder)
    results, places = public_results(results, folder), local_places(folder)
    sheet = [(data_uri(image), public_text(caption, places)) for image, caption in samples or []]
    images = {public_text(name, places): found for name, found in (score_images or {}).items()}
    content = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    texts = content, markdown_report(results), html_report(results, sheet, images)

    def save(partial: Path) -> None:
        partial.mkdir(parents=True)
        for name, text in zip(REPORT_FILES, texts, strict=True):
            (partial / Path(name).name).write_text(text, encoding="utf-8")

    try:
        replace_result(folder, Path(REPORT).name, save)
    except OSError as error:
        shutil.rmtree(folder / "partial-result", ignore_errors=True)
        raise OSError(f"The report can't be written to {str(folder)!r}: {error.strerror or error}.") from error
    return folder / "report.html"


def read_report(path: str | Path) -> dict:
    """Read the results in a `report.json` of [`write_report`]; an `OSError` if it is missing or damaged."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        check_results(results)
    except FileNotFoundError as error:
        raise OSError(f"There is no report {str(path)!r}.") from error
    except ValueError as error:
        raise OSError(f"The report {Path(path).name} is damaged: {error}") from error
    return results


def model_index_results(results: dict) -> list[EvalResult]:
    """The metrics in the form of a model card's `model-index`, each with the settings that it depends on.

    Results and errors as for [`write_report`].
    """
    check_results(results)
    results = public_results(results, Path())
    reference = results.get("reference", {}).get("name") or "a reference that is not stated"
    settings = {"num_images": results.get("count")} | results.get("sampling", {})
    found = []
    for name, value, deviation in metric_values(results["metrics"]):
        arguments = {key: item for key, item in (settings | {"std": deviation}).items() if item is not None}
        found.append(
            EvalResult(
                task_type=results.get("task", "text-to-image"),
                dataset_type=reference,
                dataset_name=reference,
                metric_type=name,
                metric_value=float(f"{value:.6g}"),
                metric_name=metric(name).label,
                metric_config=results.get("preset"),
                metric_args=arguments or None,
            )
        )
    return found
