"""Recipes: one YAML file a project, one section a stage, every field open to an override on the command line."""

import argparse
import difflib
import sys
from dataclasses import fields

import yaml
from transformers import HfArgumentParser


def parse_recipe(description: str, *sections: tuple[str, type], args: list[str] | None = None) -> tuple:
    """Read `--config RECIPE` and the flags that override it.

    Args:
        description (`str`): What the command does, for its `--help`.
        sections (`tuple[str, type]`): Name of a section of the recipe, and the dataclass that it fills.
        args (`list[str]`, *optional*): The command line; the process's own by default.

    Returns:
        One instance of each dataclass, in the order of `sections`.

    Raises:
        SystemExit: With one sentence, if the recipe or a flag is wrong.
    """
    args = sys.argv[1:] if args is None else args
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config")
    known, rest = config.parse_known_args(args)

    parser = HfArgumentParser([dataclass for _, dataclass in sections], description=description)
    parser.add_argument("--config", metavar="RECIPE", help="A YAML file, see pipelines/recipes.")
    if known.config is not None:
        try:
            with open(known.config, encoding="utf-8") as file:
                recipe = yaml.safe_load(file)
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"cannot read the recipe {known.config}: {error}")
        for name, dataclass in sections:
            values = recipe.get(name) or {}
            allowed = [field.name for field in fields(dataclass)]
            for key in values:
                if key not in allowed:
                    near = difflib.get_close_matches(key, allowed, n=1)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    parser.error(f"the recipe's section {name!r} has no key {key!r}.{hint}")
            parser.set_defaults(**values)
            for action in parser._actions:
                if action.dest in values:
                    action.required = False
    return parser.parse_args_into_dataclasses(args=rest)[: len(sections)]
