"""An error that says which argument it is about."""


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
