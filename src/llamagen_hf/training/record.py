"""What a training says about itself: `training.json` beside its result, from which a card is written."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..local_paths import public_sources


if TYPE_CHECKING:  # reading facts, as publishing does, needs no training
    from .trainer import RunConfig

FACTS_FILE = "training.json"

# Settings that say where things are or how the machine was used, and nothing about the result.
LEFT_OUT = {
    "output_dir", "codes_dir", "num_workers", "checkpointing_steps", "checkpoints_total_limit", "log_steps",
    "eval_steps", "sample_steps", "report_to", "compile", "gradient_checkpointing", "micro_batch_size",
    "auto_micro_batch_size", "max_bad_rows", "shuffle_buffer_size", "overwrite",
}  # fmt: skip


def public_settings(config) -> dict:
    """The settings of a recipe's section that determine its result, without paths of this machine."""
    return public_sources({name: value for name, value in asdict(config).items() if name not in LEFT_OUT})


def write_facts(folder: Path, facts: dict) -> None:
    """Write the facts of a training below its result, whole or not at all."""
    partial = folder / f"{FACTS_FILE}.partial"
    partial.write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    partial.replace(folder / FACTS_FILE)


def read_facts(folder: str | Path) -> dict:
    """The facts of a training; none if the folder has none, or is a Hub id."""
    path = Path(folder) / FACTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def training_facts(config: "RunConfig", metrics: dict[str, float]) -> dict:
    """A training's settings and what it reached on its test split."""
    return {"settings": public_settings(config), "metrics": metrics}
