"""When to show what is drawn so far."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


PREVIEW_SHARE = 0.1  # of the time of a drawing that previews may take, where nobody asks for more


class PreviewSchedule:
    """Says when a preview is due, and measures what previews cost.

    Args:
        every (`int`, *optional*): Codes from one to the next. By default a row of codes, but none that would take the
            previews' share of the time so far beyond [`PREVIEW_SHARE`], judging by the last.
        grid_size (`int`): Side of the grid.
    """

    def __init__(self, every: int | None, grid_size: int):
        self.every = every or grid_size
        self.is_thrifty = every is None
        self.start = time.perf_counter()
        self.spent = 0.0
        self.last = 0.0

    def is_due(self, num_drawn: int) -> bool:
        """Whether to show an image of `num_drawn` codes."""
        if num_drawn % self.every:
            return False
        drawing = time.perf_counter() - self.start - self.spent
        return not self.is_thrifty or self.spent + self.last <= PREVIEW_SHARE * drawing

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Wraps the making of a preview."""
        start = time.perf_counter()
        yield
        self.last = time.perf_counter() - start
        self.spent += self.last
