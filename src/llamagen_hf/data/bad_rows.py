"""Rows that can't be used: counted and named, up to a limit."""

import logging
from collections import Counter


logger = logging.getLogger(__name__)


class BadRow(ValueError):
    """A row that can't be used. The message says why: what kind of fault it is and, after a colon, its details."""


class BadRows:
    """Counts the rows of a run that can't be used, each once; a part of a run's checkpoints.

    Args:
        limit (`int`): How many there may be. One process counts the rows that it sees itself.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.reasons: dict[tuple[str, int | str], str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, index: int | str, reason: str, split: str = "train") -> None:
        """Count row `index` of `split`, and log it the first time.

        Raises:
            ValueError: Once there are more than `limit`.
        """
        if (split, index) in self.reasons:
            return
        self.reasons[split, index] = reason
        place = f"row {index}" if split == "train" else f"row {index} of {split}"
        logger.warning("Can't use %s: %s.", place, reason)
        if len(self) > self.limit:
            raise ValueError(
                f"{len(self)} row(s) can't be used, more than max_bad_rows ({self.limit}) allows; "
                f"the last: {place}: {reason}."
            )

    def report(self) -> dict[str, int]:
        """How many there are of each kind of fault, the most frequent first."""
        return dict(Counter(reason.partition(":")[0] for reason in self.reasons.values()).most_common())

    def state_dict(self) -> dict[str, list]:
        return {"rows": [(split, index, reason) for (split, index), reason in self.reasons.items()]}

    def load_state_dict(self, state: dict[str, list]) -> None:
        self.reasons = {(split, index): reason for split, index, reason in state["rows"]}
