"""In which order waiting images join the batch."""

import heapq
from itertools import count

from .engine import EngineRequest


class WaitingQueue:
    """Images that wait for a slot, in the order in which they get one.

    First come, first served, except that the i-th image of a request is placed as if it had come `spacing * i` images
    later. So a request of ten images does not make the next request wait for all of them, and yet each image waits
    for a bounded number of others.

    Args:
        spacing (`int`): Distance between the images of one request, in images.
    """

    def __init__(self, spacing: int):
        self.spacing = spacing
        self._heap: list[tuple[int, int, str]] = []
        self._requests: dict[str, EngineRequest] = {}
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, name: str, request: EngineRequest) -> None:
        """Append a request, under a name that no other one here has."""
        arrival = next(self._arrivals)
        heapq.heappush(self._heap, (arrival + self.spacing * request.place, arrival, name))
        self._requests[name] = request

    def discard(self, name: str) -> None:
        """Drop a request, if it is here."""
        self._requests.pop(name, None)

    def first(self) -> EngineRequest | None:
        """The next request, `None` if there is none."""
        while self._heap and self._heap[0][2] not in self._requests:
            heapq.heappop(self._heap)
        return self._requests[self._heap[0][2]] if self._heap else None

    def pop(self) -> tuple[str, EngineRequest]:
        """Remove and return the next request and its name. There must be one."""
        self.first()
        *_, name = heapq.heappop(self._heap)
        return name, self._requests.pop(name)
