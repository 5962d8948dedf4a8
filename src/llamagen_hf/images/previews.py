"""When to show an image that is not complete yet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


PREVIEW_SHARE = 0.1  # of the time of a generation that previews may take by default


class PreviewSchedule:
    """Says when a preview is due, and measures what previews cost.

    Args:
        every (`int`, *optional*): Codes from one preview to the next. By default a row of codes, as long as the time
            spent on previews stays below [`PREVIEW_SHARE`], judging by the last one.
        grid_size (`int`): Side of the grid of codes.
    """

    def __init__(self, every: int | None, grid_size: int):
        self.every = every or grid_size
        self.is_thrifty = every is None
        self.start = time.perf_counter()
        self.spent = 0.0
        self.last = 0.0

    def is_due(self, num_drawn: int) -> bool:
        """Whether to show an image that has `num_drawn` codes so far."""
        if num_drawn % self.every:
            return False
        generating = time.perf_counter() - self.start - self.spent
        return not self.is_thrifty or self.spent + self.last <= PREVIEW_SHARE * generating

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the time that decoding a preview takes."""
        start = time.perf_counter()
        yield
        self.last = time.perf_counter() - start
        self.spent += self.last
