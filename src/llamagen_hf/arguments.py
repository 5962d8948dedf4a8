"""Values of arguments: plain numbers, choices, and an error that says which argument is wrong."""

from types import NoneType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch


class FieldError(ValueError):
    """An argument has a wrong value.

    Args:
        field (`str`): Name of the argument, as the function that checks it calls it.
        message (`str`): What is wrong, as a whole sentence.
    """

    def __init__(self, field: str, message: str):
        super().__init__(field, message)
        self.field = field

    def __str__(self) -> str:
        return self.args[1]


def plain(value):
    """Numbers of numpy and torch, alone or in an array, as Python's; anything else as it is."""
    if isinstance(value, np.ndarray) or (isinstance(value, torch.Tensor) and value.ndim <= 1):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def is_integer(value) -> bool:
    """Whether a value is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value) -> bool:
    """Whether a value is an integer of at least 1."""
    return is_integer(value) and value >= 1


def check_choices(config) -> None:
    """Check the fields of a dataclass that have a `Literal` type, which parsers show and check too.

    Raises:
        FieldError: If a field has another value.
    """
    for name, kind in get_type_hints(type(config)).items():
        value, parts = getattr(config, name), get_args(kind) if get_origin(kind) is Union else [kind]
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        if choices and value not in choices and not (value is None and NoneType in parts):
            *others, last = map(repr, choices)
            raise FieldError(name, f"{name} is {value!r}; expected {', '.join(others)} or {last}.")
