"""The stages from images to a checkpoint as commands: a recipe and overrides in, a report in JSON out."""

import json
import logging
import sys
from collections.abc import Callable

import diffusers
import transformers

from llamagen_hf.processes import leave_processes, this_process
from llamagen_hf.training.recipe import parse_recipe


PREPARATIONS = ("filter", "score", "recaption")


def run_stage(
    description: str, function: Callable[..., dict], *sections: tuple[str, type], args: list[str] | None = None
) -> None:
    """Read the recipe's sections and run a stage on them.

    Args:
        description (`str`): What the stage does, for `--help`.
        function (`Callable`): Takes the sections' dataclasses, returns a report.
        sections (`tuple[str, type]`): Names of sections of the recipe, and the dataclasses that they fill.
        args (`list[str]`, *optional*): The command line; the process's own by default.

    Raises:
        SystemExit: With one sentence, if something is wrong with the recipe, the data or a file.
    """
    configs = parse_recipe(description, *sections, args=args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "httpx2", "accelerate.accelerator", "accelerate.checkpointing", "accelerate.utils.other"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    try:
        report = function(*configs)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"Error: {error}")
    if this_process().is_main_process:
        print(json.dumps(report, indent=2))
    leave_processes()


def prepare(description: str, args: list[str] | None = None) -> None:
    """Stage 0, whose first argument says which part of it."""
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name not in PREPARATIONS:
        print(description)
        sys.exit(0 if name in ("-h", "--help") else f"Error: {name!r} is not one of {', '.join(PREPARATIONS)}.")
    from llamagen_hf.data import filtering, recaptioning, scoring

    sections = {
        "filter": (filtering.filter_rows, filtering.FilterConfig),
        "score": (scoring.score, scoring.ScoreConfig),
        "recaption": (recaptioning.recaption, recaptioning.RecaptionConfig),
    }
    function, config = sections[name]
    run_stage(description, function, (name, config), args=rest)


def train_tokenizer(description: str, args: list[str] | None = None) -> None:
    """Stage 1."""
    from llamagen_hf.data.source import DataConfig
    from llamagen_hf.llamagen.training.vq_config import TokenizerTrainingConfig
    from llamagen_hf.llamagen.training.vq_trainer import train_tokenizer as function

    run_stage(description, function, ("data", DataConfig), ("tokenizer", TokenizerTrainingConfig), args=args)


def extract_codes(description: str, args: list[str] | None = None) -> None:
    """Stage 2."""
    from llamagen_hf.data.source import DataConfig
    from llamagen_hf.llamagen.training.extraction import CodeExtractionConfig
    from llamagen_hf.llamagen.training.extraction import extract_codes as function

    run_stage(description, function, ("data", DataConfig), ("codes", CodeExtractionConfig), args=args)


def train_generator(description: str, args: list[str] | None = None) -> None:
    """Stage 3."""
    from llamagen_hf.llamagen.training.generator_config import GeneratorTrainingConfig
    from llamagen_hf.llamagen.training.generator_trainer import train_generator as function

    run_stage(description, function, ("generator", GeneratorTrainingConfig), args=args)
