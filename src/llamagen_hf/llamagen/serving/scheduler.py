"""Who is next."""

import heapq
from itertools import count

from ...serving.engine import GenerationRequest


class WaitingLine:
    """Images that wait for a slot, in the order in which they get one.

    First come, first served, except that the i-th image of a request stands where it would if it had come `spacing`
    times i images later. So ten images that were asked for at once do not make the next request wait for all of
    them, and yet each waits for a bounded number of others.

    Args:
        spacing (`int`): In images.
    """

    def __init__(self, spacing: int):
        self.spacing = spacing
        self._heap: list[tuple[int, int, str]] = []
        self._requests: dict[str, GenerationRequest] = {}
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, name: str, request: GenerationRequest) -> None:
        """Take a place in the line, under a name of one's own."""
        arrival = next(self._arrivals)
        heapq.heappush(self._heap, (arrival + self.spacing * request.place, arrival, name))
        self._requests[name] = request

    def discard(self, name: str) -> None:
        """Leave the line, if in it."""
        self._requests.pop(name, None)

    def first(self) -> GenerationRequest | None:
        """Who is next, if anybody."""
        while self._heap and self._heap[0][2] not in self._requests:
            heapq.heappop(self._heap)
        return self._requests[self._heap[0][2]] if self._heap else None

    def pop(self) -> tuple[str, GenerationRequest]:
        """Take who is next out of the line; there is somebody."""
        self.first()
        *_, name = heapq.heappop(self._heap)
        return name, self._requests.pop(name)
