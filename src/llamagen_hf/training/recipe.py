"""Recipes: one YAML file a project, one section a stage, every field open to an override on the command line."""

import argparse
import difflib
import json
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


# Sections of earlier versions. Former names of keys are the aliases of a dataclass's fields.
RENAMED_SECTIONS = {"tokenizer": "vq_model"}


def parse_recipe(description: str, *sections: tuple[str, type], args: list[str] | None = None) -> tuple:
    """Read `--config RECIPE` and the flags that override it.

    Args:
        description (`str`): What the command does, for its `--help`.
        sections (`tuple[str, type]`): Name of a section of the recipe, and the dataclass that it fills.
        args (`list[str]`, *optional*): The command line; the process's own by default.

    Returns:
        One instance of each dataclass, in the order of `sections`.

    Raises:
        SystemExit: The recipe or a flag is wrong; what is wrong is printed as one sentence.
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
    try:
        if known.config is not None:
            recipe = read_recipe(known.config, sections)
            for name, dataclass in sections:
                if not isinstance(recipe.get(name), dict):
                    raise ValueError(f"the recipe has no section {name!r}; it has {', '.join(map(str, recipe))}")
                _check_section(name, recipe[name], dataclass)
                parser.set_defaults(**recipe[name])
                for action in parser._actions:
                    action.required = action.required and action.dest not in recipe[name]
        *configs, remaining = parser.parse_args_into_dataclasses(args=rest, return_remaining_strings=True)
    except ValueError as error:  # also from the checks of a dataclass
        parser.error(str(error))
    if remaining:
        parser.error(f"there is no option {remaining[0]}")
    return tuple(configs[: len(sections)])


def read_recipe(path: str | Path, sections: Iterable[tuple[str, type]] = ()) -> dict:
    """Read a recipe and the ones that it is derived from.

    A recipe may name another one as its `base`, by a path relative to its own folder. Its sections are added to those
    of the base key by key, and the value of a key replaces that of the base as a whole.

    Args:
        path (`str` or `os.PathLike`): The YAML file.
        sections (`Iterable[tuple[str, type]]`, *optional*): Names and dataclasses of sections whose keys may have
            their former names.

    Returns:
        `dict`: The keys of each section, by the section's name.

    Raises:
        ValueError: A file can't be read or has no sections, or a recipe is its own base.
    """
    files, recipes, base = [], [], str(path)
    while base is not None:
        path = Path(base) if not files else files[-1].parent / base
        if path.resolve() in [file.resolve() for file in files]:
            raise ValueError(f"the recipe {path} is its own base: {' -> '.join(map(str, [*files, path]))}")
        recipe = _read_yaml(path, files[-1] if files else None)
        base = recipe.pop("base", None)
        if not isinstance(base, str | None):
            raise ValueError(f"the recipe {path} has base: {base!r}; it must be the path of another recipe")
        files.append(path)
        recipes.append(recipe)
    merged, dataclasses = {}, dict(sections)
    for recipe in reversed(recipes):
        for name, section in recipe.items():
            name = RENAMED_SECTIONS.get(name, name)
            if isinstance(section, dict):
                renamed = _former_names(dataclasses[name]) if name in dataclasses else {}
                section = {renamed.get(key, key): value for key, value in section.items()}
                before = merged.get(name)
                section = before | section if isinstance(before, dict) else section
            merged[name] = section
    return merged


def _read_yaml(path: Path, derived: Path | None) -> dict:
    of = "" if derived is None else f", the base of {derived}"
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors begin a file with a byte order mark
            recipe = yaml.safe_load(file)
    except UnicodeDecodeError:
        raise ValueError(f"cannot read the recipe {path}{of}: it is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}{of}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date that does not exist
        raise ValueError(f"cannot read the recipe {path}{of}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"the recipe {path}{of} has no sections")
    return recipe


def _former_names(dataclass: type) -> dict[str, str]:
    """Today's names of a dataclass's fields by the names that they had in earlier versions."""
    return {
        alias.lstrip("-"): field.name for field in fields(dataclass) for alias in field.metadata.get("aliases", ())
    }


def _check_section(name: str, section: dict, dataclass: type) -> None:
    """Raise a `ValueError` for a key that the dataclass does not have, or a value of another type."""
    types = {field.name: get_type_hints(dataclass)[field.name] for field in fields(dataclass)}
    for key, value in section.items():
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"the recipe's section {name!r} has no key {key!r}.{hint}")
        if not _fits(value, types[key]):
            raise ValueError(f"the recipe's section {name!r} has {key}: {value!r}; it must be {_describe(types[key])}")


def _fits(value, kind) -> bool:
    """Whether a value read from YAML can fill a field of this type."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(entry, get_args(kind)[0]) for entry in value)
    if kind is float:  # YAML reads 1e-4, without a point, as text
        try:
            return not isinstance(value, bool) and float(value) is not None
        except (TypeError, ValueError):
            return False
    return type(value) is (get_origin(kind) or kind)


def _describe(kind) -> str:
    """A type in the words of YAML, such as "int or null" or "'hinge' or 'vanilla'"."""
    if get_origin(kind) is list:
        return f"a list of {_describe(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        choices = [repr(choice) for choice in get_args(kind)]
    elif isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " or ".join(_describe(part) for part in get_args(kind))
    else:
        choices = ["null" if kind is NoneType else getattr(kind, "__name__", str(kind))]
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def _json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value
