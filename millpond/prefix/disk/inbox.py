"""What is asked of the writer's thread: any thread puts, that thread takes. No call waits for more than the lock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from threading import Condition
from typing import NamedTuple

from millpond.prefix.disk.reader import Fault
from millpond.prefix.records import RecordHead, RecordId


class WriteJob(NamedTuple):
    """A record to be written."""

    head: RecordHead
    payload: bytes


class Taken(NamedTuple):
    """All that was asked since the last take."""

    writes: list[WriteJob]
    faults: list[Fault]
    touched: list[RecordId]
    """In the order of their use, each once."""
    cancelled: list[WriteJob]
    """Writes that were still queued when their record was discarded."""


class Inbox:
    """The lock is only held to move things from one list to another, never during a file or database call."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._writes: deque[WriteJob] = deque()
        self._faults: list[Fault] = []
        self._touched: dict[RecordId, None] = {}
        self._cancelled: list[WriteJob] = []
        self._deadline: float | None = None

    def write(self, job: WriteJob) -> bool:
        """Queue a write; False once closed."""
        with self._changed:
            if self._deadline is not None:
                return False
            self._writes.append(job)
            self._changed.notify()
            return True

    def touch(self, ids: Iterable[RecordId]) -> None:
        with self._changed:
            quiet = not self._touched
            for record in ids:
                self._touched.pop(record, None)
                self._touched[record] = None
            if quiet:
                self._changed.notify()

    def report(self, fault: Fault) -> None:
        """Queue the removal of a record that a reader found wrong."""
        with self._changed:
            self._faults.append(fault)
            self._changed.notify()

    def discard(self, ids: Iterable[RecordId]) -> None:
        """Queue the removal of records, and take back writes of them that have not begun."""
        unwanted = set(ids)
        with self._changed:
            self._faults += [Fault(record) for record in unwanted]
            self._cancelled += [job for job in self._writes if job.head.id in unwanted]
            self._writes = deque(job for job in self._writes if job.head.id not in unwanted)
            self._changed.notify()

    def close(self, deadline: float) -> None:
        """Refuse new writes; what is queued may be done until a moment of the monotonic clock."""
        with self._changed:
            self._deadline = deadline
            self._changed.notify()

    @property
    def deadline(self) -> float | None:
        """When work has to end; None while it goes on."""
        return self._deadline

    @property
    def faulty(self) -> bool:
        """Whether removals are waiting."""
        return bool(self._faults)

    def take(self, until: float, most_writes: int) -> Taken:
        """Everything queued, waiting for something until a moment of the monotonic clock, or until closed."""
        with self._changed:
            self._changed.wait_for(self._any, max(0.0, until - time.monotonic()))
            writes = [self._writes.popleft() for _ in range(min(most_writes, len(self._writes)))]
            batch = Taken(writes, self._faults, list(self._touched), self._cancelled)
            self._faults, self._touched, self._cancelled = [], {}, []
            return batch

    def _any(self) -> bool:
        return bool(self._writes or self._faults or self._touched or self._cancelled or self._deadline is not None)
