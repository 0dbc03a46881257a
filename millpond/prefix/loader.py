"""Brings records from the SSD into memory for requests that wait. Engine thread only.

A load is worth its time only if it is predicted to take less of it than computing the tokens; a request that has waited
as long as computing would have taken goes on with what it has. The reading speed is learnt from every read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from millpond.prefix.records import Expected, Kind, RecordId
from millpond.prefix.saver import Disk, head_of
from millpond.prefix.tree import Node

FIRST_SPEED = 200e6
"""Bytes per second assumed before the first read, which is made at start."""
TRIALS = 3
"""The fastest of so many first reads counts. A machine that has just started is busy, and whoever believes a fast disk
to be slow never finds out; the other mistake costs one wait, which has a deadline."""
FILE_SECONDS = 0.001
"""What a read costs besides its bytes."""
MEMORY = 0.8
"""Weight of what is known about the speed when a read is observed."""


@dataclass(eq=False)
class Load:
    """What one request waits for."""

    waiting: set[RecordId]
    deadline: float
    """Seconds, monotonic: computing would be done by then."""
    failed: bool = False

    def waits(self, now: float) -> bool:
        """Whether something is still to come, and worth waiting for."""
        return bool(self.waiting) and now < self.deadline


class Loader:
    """``prefill_seconds(start, tokens)`` predicts computing."""

    def __init__(self, disk: Disk, prefill_seconds: Callable[[int, int], float]) -> None:
        self._disk = disk
        self._prefill_seconds = prefill_seconds
        self._reading: dict[RecordId, list[Load]] = {}
        """What is being read, and who waits for it: nobody, if it is only to measure the disk."""
        self._ticket = 0
        self.bytes_per_second = FIRST_SPEED
        self._observed = 0

    def deadline(self, now: float) -> float | None:
        """The first deadline to come of those that wait, or None."""
        ahead = (load.deadline for loads in self._reading.values() for load in loads if load.deadline > now)
        return min(ahead, default=None)

    def pays(self, needs: Sequence[tuple[Node, Kind]], start: int, end: int) -> bool:
        """Whether reading these records is predicted to be faster than computing tokens [start, end)."""
        queued = len(self._reading) * FILE_SECONDS
        nbytes = sum(node.disk.get(kind, 0) for node, kind in needs)
        reading = nbytes / self.bytes_per_second + len(needs) * FILE_SECONDS + queued
        return reading < self._prefill_seconds(start, end - start)

    def measure(self, records: Sequence[Expected]) -> None:
        """Read a few to learn how fast the disk is, before anybody has to know."""
        for record in records[:TRIALS]:
            self._read(record)

    def awaited(self, record: RecordId) -> bool:
        """Whether somebody has asked for this record since it began to be read."""
        return bool(self._reading.get(record))

    def load(self, needs: Sequence[tuple[Node, Kind]], start: int, end: int, now: float) -> Load:
        """Read these records."""
        load = Load(set(), now + self._prefill_seconds(start, end - start))
        for node, kind in needs:
            record = RecordId(node.key, kind)
            load.waiting.add(record)
            if record not in self._reading:
                self._read(head_of(node, kind))
            self._reading[record].append(load)
        return load

    def _read(self, record: Expected) -> None:
        self._reading[record.id] = []
        self._ticket += 1
        self._disk.read(record, self._ticket)

    def arrived(self, record: RecordId, nbytes: int, seconds: float, problem: str) -> None:
        """A read has ended, well or badly."""
        if not problem and nbytes > 0 and seconds > 0:
            observed = nbytes / max(seconds - FILE_SECONDS, seconds / 2)
            if self._observed >= TRIALS:
                observed = MEMORY * self.bytes_per_second + (1 - MEMORY) * observed
            elif self._observed:
                observed = max(observed, self.bytes_per_second)
            self.bytes_per_second = observed
            self._observed += 1
        for load in self._reading.pop(record, ()):
            load.waiting.discard(record)
            load.failed = load.failed or bool(problem)
