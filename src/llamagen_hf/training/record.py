"""What a training says about itself: `training.json` beside its result, from which a card is written."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..local_paths import public_sources


if TYPE_CHECKING:
    from .config import RunConfig

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


def read_facts(folder: str | Path) -> dict:
    """The facts of a training, under the names of this version; empty if the folder has none, or is a Hub id."""
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        return {}
    facts = json.loads(path.read_text(encoding="utf-8"))
    return {"vq_model" if name == "tokenizer" else name: value for name, value in facts.items()}


def training_facts(config: "RunConfig", metrics: dict[str, float]) -> dict:
    """A training's settings and what it reached on its test split."""
    return {"settings": public_settings(config), "metrics": metrics}
