"""How requests ended. Event loop only."""

from __future__ import annotations

from collections import Counter

from millpond.types import ErrorKind, Finish


class Counts:
    """How requests ended since the start; ``submitted`` is the sum of the others plus the open ones."""

    def __init__(self) -> None:
        self.submitted = 0
        self.by_finish: Counter[Finish] = Counter()
        self.by_error: Counter[ErrorKind] = Counter()
        self.cancelled = 0
        self.restarts = 0

    @property
    def finished(self) -> int:
        return self.by_finish.total()

    @property
    def failed(self) -> int:
        return self.by_error.total()
