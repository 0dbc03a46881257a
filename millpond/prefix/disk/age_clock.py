"""The time that ages of records are measured in: wall time without its jumps.

A record's age must survive restarts, so it is kept as wall time; but a clock that is set forward by a year must not
expire a whole cache. Between two looks at the wall clock this one advances with a steady clock that counts sleep too,
so a difference between both is a clock that was set, not a machine that slept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

TOLERANCE = 60.0
"""Seconds that wall and steady clock may drift apart before it counts as a jump."""
DAY = 86400


class AgeClock:
    """Seconds since 1970 as this process sees them. Any thread may read it; one may ``settle`` it."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] | None = None) -> None:
        self._wall = wall
        self._steady = steady or _steady
        # One tuple, replaced whole, so that readers need no lock.
        self._base = (wall(), self._steady())

    def now(self) -> float:
        """Wall time at the last settling plus what the steady clock has counted since."""
        wall, steady = self._base
        return wall + self._steady() - steady

    def day(self) -> int:
        """Days since 1970, UTC."""
        return int(self.now() // DAY)

    def settle(self) -> float:
        """Follow the wall clock again; returns by how many seconds it has jumped (0 for mere drift)."""
        wall, steady = self._wall(), self._steady()
        jump = wall - (self._base[0] + steady - self._base[1])
        self._base = (wall, steady)
        return jump if abs(jump) > TOLERANCE else 0.0


def _steady() -> float:
    # Both count sleep; on macOS time.monotonic does not, on Linux the monotonic clock does not.
    return time.clock_gettime(time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC)
