"""How long a chat template may compute: a template that never comes to an end must not keep a thread for ever.

Each round of a loop, each call of a macro and each filter asks whether the time is up. Nothing between two of these
takes long: the sandbox limits the length of a range, and `environment` that of what ``*`` and ``**`` make. The time is
what the thread has computed, not what has passed, so that a busy machine changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

ROUNDS_PER_LOOK = 32
"""Looking at the clock is a call of the system; asking, all told, takes a tenth of that."""


class EndlessError(Exception):
    """A template has used up its time. The message says how much that was."""


class Allowance:
    """The time of the threads that render. Each has its own."""

    def __init__(self, seconds: float) -> None:
        """``seconds`` of computing, for each piece of work."""
        self._seconds = seconds
        self._own = _Own()

    @contextmanager
    def given(self) -> Iterator[None]:
        """What the calling thread does inside gets the whole time."""
        own = self._own
        own.deadline = time.thread_time() + self._seconds
        own.rounds = 0
        try:
            yield
        finally:
            own.deadline = None

    def spend(self) -> None:
        """One more round. Raises EndlessError when the time is up."""
        own = self._own
        own.rounds += 1
        if own.rounds % ROUNDS_PER_LOOK == 0 and own.deadline is not None and time.thread_time() > own.deadline:
            raise EndlessError(f"it has computed for {self._seconds:g} s without coming to an end")


class _Own(threading.local):
    deadline: float | None = None
    rounds: int = 0
