"""The report of an evaluation as Markdown, for a paper's appendix or a model card."""

import re

from .results import caveats, headline, score_metric, settings, summary, sweep_table, title, worst_and_best


def markdown_report(results: dict) -> str:
    """The report without its images, in GitHub's Markdown."""
    blocks = [f"# {markdown_text(title(results))}", markdown_summary(results), markdown_notes(results)]
    rows = [[markdown_text(cell) for cell in row] for row in settings(results)]
    blocks += ["## Settings", markdown_table(["setting", "value"], rows, "---")] if rows else []
    head, rows = sweep_table(results)
    blocks += ["## Guidance", markdown_table([markdown_text(cell) for cell in head], rows)] if rows else []
    worst, best = worst_and_best(results)
    if best:
        measure = score_metric(results)
        for heading, entries in (("Best", best), ("Worst", worst)):
            rows = [[markdown_text(entry["name"]), measure.write(entry["score"])] for entry in entries]
            blocks += [f"## {heading}", markdown_table(["", markdown_text(measure.title)], rows)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_summary(results: dict) -> str:
    """A sentence on what was evaluated, and its metrics as a table of one row, as in papers."""
    shown = headline(results)
    row = [markdown_text(title(results))]
    row += [" ± ".join(filter(None, (entry["value"], entry["std"]))) for entry in shown]
    table = markdown_table(["", *(markdown_text(entry["metric"].title) for entry in shown)], [row])
    return "\n\n".join(part for part in (markdown_text(summary(results)), table) if part)


def markdown_notes(results: dict) -> str:
    """What to know before comparing, as a list."""
    return "\n".join(f"- {markdown_text(text)}" for text in caveats(results))


def markdown_table(head: list[str], rows: list[list[str]], align: str = "---:") -> str:
    """A table whose first column is aligned left and all others as `align` says."""
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_text(text: str) -> str:
    """A text on one line, escaped so that nothing in it is Markdown or HTML."""
    return re.sub(r"[\\`*\[\]<>|&~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))
