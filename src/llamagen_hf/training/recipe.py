"""Recipes: one YAML file a project, one section a stage, every field open to an override on the command line."""

import argparse
import difflib
import json
import sys
from dataclasses import fields
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

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
    parser.error = lambda message: parser.exit(2, f"Error: {message} (--help lists what there is)\n")
    for action in parser._actions:
        if action.type is dict:
            action.type = _json_object
    if known.config is not None:
        try:
            with open(known.config, encoding="utf-8-sig") as file:  # some editors begin a file with a mark
                recipe = yaml.safe_load(file)
        except UnicodeDecodeError:
            parser.error(f"cannot read the recipe {known.config}: it is not UTF-8; save it as UTF-8")
        except OSError as error:
            parser.error(f"cannot read the recipe {known.config}: {error.strerror or error}")
        except (yaml.YAMLError, ValueError) as error:  # such as a date that there is not
            parser.error(f"cannot read the recipe {known.config}: {' '.join(str(error).split())}")
        if not isinstance(recipe, dict):
            parser.error(f"the recipe {known.config} has no sections")
        for name, dataclass in sections:
            if not isinstance(recipe.get(name), dict):
                parser.error(f"the recipe has no section {name!r}; it has {', '.join(map(str, recipe))}")
            allowed = [field.name for field in fields(dataclass)]
            for key in recipe[name]:
                if key not in allowed:
                    near = difflib.get_close_matches(str(key), allowed, n=1)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    parser.error(f"the recipe's section {name!r} has no key {key!r}.{hint}")
            types = get_type_hints(dataclass)
            for key, value in recipe[name].items():
                if not _fits(value, types[key]):
                    is_choice = get_origin(types[key]) is Literal
                    kind = " or ".join(map(repr, get_args(types[key]))) if is_choice else None
                    kind = kind or str(getattr(types[key], "__name__", types[key]))
                    parser.error(f"the recipe's section {name!r} has {key}: {value!r}; it must be {kind}")
            parser.set_defaults(**recipe[name])
            for action in parser._actions:
                if action.dest in recipe[name]:
                    action.required = False
    try:
        *configs, remaining = parser.parse_args_into_dataclasses(args=rest, return_remaining_strings=True)
    except ValueError as error:  # from the checks of a section
        parser.error(str(error))
    if remaining:
        parser.error(f"there is no option {remaining[0]}")
    return tuple(configs[: len(sections)])


def _fits(value, kind) -> bool:
    """Whether a value read from YAML can fill a field of this type."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(entry, get_args(kind)[0]) for entry in value)
    if kind is float:  # YAML reads 1e-4, without a point, as text
        try:
            return not isinstance(value, bool) and float(value) is not None
        except (TypeError, ValueError):
            return False
    return type(value) is (get_origin(kind) or kind)


def _json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value
