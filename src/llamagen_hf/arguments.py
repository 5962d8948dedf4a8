"""Values of arguments: plain numbers, choices, and an error that says which argument is wrong."""

from typing import Literal, get_args, get_origin, get_type_hints

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
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value) -> bool:
    return is_integer(value) and value >= 1


def find_choices(kind) -> tuple | None:
    """The values that a type admits if it is a `Literal`, or one or `None`; else `None`."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = get_args(kind)
    if len(parts) == 2 and parts[1] is type(None) and get_origin(parts[0]) is Literal:
        return (*get_args(parts[0]), None)
    return None


def check_choices(settings) -> None:
    """Check the fields of a dataclass whose types are `Literal`.

    Raises:
        FieldError: A field's value is not one of its choices.
    """
    for name, kind in get_type_hints(type(settings)).items():
        choices, value = find_choices(kind), getattr(settings, name)
        if choices is not None and value not in choices:
            *others, last = map(repr, choices)
            raise FieldError(name, f"{name} is {value!r}; expected {', '.join(others)} or {last}.")
