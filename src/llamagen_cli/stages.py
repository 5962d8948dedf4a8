"""`llamagen prepare | train-tokenizer | extract-codes | train-...`: a recipe in, JSON out.

The scripts in `pipelines/` are the same commands, for `accelerate launch`.
"""

import json
import logging
import sys
from importlib import import_module
from typing import get_type_hints

import typer

from .app import app


# By command: the function that does the work, and the recipe's sections for its arguments.
STAGES = {
    "prepare filter": ("llamagen_hf.data.filtering.filter_rows", ["filter"]),
    "prepare score": ("llamagen_hf.data.scoring.score", ["score"]),
    "prepare recaption": ("llamagen_hf.data.recaptioning.recaption", ["recaption"]),
    "train-tokenizer": ("llamagen_hf.llamagen.training.vq_trainer.train_tokenizer", ["data", "vq_model"]),
    "extract-codes": ("llamagen_hf.llamagen.training.extraction.extract_codes", ["data", "codes"]),
    "train-generator": ("llamagen_hf.llamagen.training.generator_trainer.train_generator", ["generator"]),
    "train-diffusion": ("llamagen_hf.diffusion.training.diffusion_trainer.train_diffusion", ["data", "diffusion"]),
    "train-prior": ("llamagen_hf.unclip.training.prior_trainer.train_prior", ["data", "prior"]),
    "train-classifier": ("llamagen_hf.diffusion.training.classifier_trainer.train_classifier", ["data", "classifier"]),
    "train-clip": ("llamagen_hf.unclip.training.clip_trainer.train_clip", ["data", "clip"]),
}
HELP = {
    "prepare": "Choose (filter), score or recaption images from the web. --config RECIPE",
    "train-tokenizer": "Train the image tokenizer. --config RECIPE [--override ...]",
    "extract-codes": "Turn images into codes, once. --config RECIPE [--override ...]",
    "train-generator": "Train the generator on codes. --config RECIPE [--override ...]",
    "train-diffusion": "Train a pixel diffusion model or an upsampler. --config RECIPE [--override ...]",
    "train-prior": "Train a prior from captions to image embeddings. --config RECIPE [--override ...]",
    "train-classifier": "Train a classifier that guides pixel diffusion. --config RECIPE [--override ...]",
    "train-clip": "Train a CLIP on images and captions. --config RECIPE [--override ...]",
}


def read_stage(command: str, args: list[str]) -> tuple:
    """Find a stage's function, and read its settings.

    Args:
        command (`str`): `llamagen COMMAND`.
        args (`list[str]`): What follows: for `prepare` first its part, then `--config RECIPE` and overrides.

    Returns:
        `tuple`: The function, and the dataclasses that it takes.

    Raises:
        SystemExit: With one sentence, the recipe or a flag is wrong, or the training's packages are not installed.
    """
    description = HELP[command]
    if command == "prepare":
        part, *args = args or ["--help"]
        if (command := f"prepare {part}") not in STAGES:
            print(description)
            parts = ", ".join(name.removeprefix("prepare ") for name in STAGES if name.startswith("prepare "))
            sys.exit(0 if part in ("-h", "--help") else f"Error: {part!r} is not one of {parts}.")
    path, sections = STAGES[command]
    module, _, name = path.rpartition(".")
    try:
        from llamagen_hf.training.recipe import parse_recipe

        function = getattr(import_module(module), name)
    except ImportError as error:
        sys.exit(f"Error: {error}; training needs `pip install llamagen-hf[train]`.")
    dataclasses = list(get_type_hints(function).values())
    return function, parse_recipe(description, *zip(sections, dataclasses, strict=False), args=args)


def run_stage(command: str, args: list[str]) -> None:
    """Run a stage and print its report; arguments as for [`read_stage`].

    Raises:
        SystemExit: With one sentence, something is wrong with the recipe, the data or a file.
    """
    function, configs = read_stage(command, args)
    import diffusers
    import transformers

    from llamagen_hf.processes import leave_processes, this_process

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


def add_stage(command: str) -> None:
    """Add a stage to the command line; it reads its own flags, one for each field of its sections."""

    @app.command(
        command, help=HELP[command], add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )  # fmt: skip
    def run(context: typer.Context):
        run_stage(command, context.args)


for command in HELP:
    add_stage(command)
