"""Values of arguments: plain numbers, and an error that says which argument is wrong."""

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
