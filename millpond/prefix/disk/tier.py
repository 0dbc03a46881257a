"""The SSD tier as the engine sees it: requests go into queues, answers come as events. No call waits for the disk.

One thread writes, removes and keeps the index (writer.py), two read (reader.py). The contract:

- ``Saved`` without a problem: the record is found after a restart. Where durable, also after a loss of power.
- A record is served only if every byte, its namespace, key, parent, position and tokens are what was written.
- Whatever the disk does is a miss and a counter, never an exception and never a dead thread.
- Several processes may use one folder. Each holds the cap over all; for the time of one batch of writes the other's
  may come on top.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from millpond.prefix.disk.age_clock import AgeClock
from millpond.prefix.disk.events import Opened, SsdEvent
from millpond.prefix.disk.files import Files
from millpond.prefix.disk.inbox import Inbox, WriteJob
from millpond.prefix.disk.pool import DiskPool
from millpond.prefix.disk.reader import DiskReader
from millpond.prefix.disk.stats import SsdStats, Tally
from millpond.prefix.disk.writer import DiskWriter
from millpond.prefix.records import Expected, RecordHead, RecordId
from millpond.settings import PrefixSettings

_log = logging.getLogger("millpond.prefix.disk.tier")

UPKEEP_SECONDS = 60.0
"""How often age, cap and free space are looked at when nothing is written."""


class SsdTier:
    """Records of one namespace in one folder. Any thread may call any method; all but ``close`` return at once.

    ``namespace`` is a digest in hex. ``notify`` is called from the tier's threads, one
    event at a time per thread, beginning with ``Opened``; it must not block.
    """

    def __init__(
        self,
        folder: Path,
        namespace: str,
        settings: PrefixSettings,
        notify: Callable[[SsdEvent], None],
        *,
        files: Files | None = None,
        clock: AgeClock | None = None,
        upkeep_seconds: float = UPKEEP_SECONDS,
    ) -> None:
        files = files or Files()
        self._notify = notify
        self._tally = Tally()
        self._inbox = Inbox()
        self._reader = DiskReader(folder, namespace, files, self._tally, self._tell, self._inbox.report)
        pool = DiskPool(folder, files, clock or AgeClock(), durable=settings.ssd_durability == "durable")
        self._writer = DiskWriter(
            pool, self._inbox, namespace, settings, self._tally, self._tell, upkeep_seconds=upkeep_seconds
        )

    def start(self) -> None:
        """Open the folder in the background; ``Opened`` follows."""
        self._reader.start()
        self._writer.start()

    def read(self, expected: Expected, ticket: int) -> None:
        """Ask for a record; ``Loaded`` with this ticket follows. Not after ``close``."""
        self._reader.read(expected, ticket)

    def taken(self) -> None:
        """A ``Loaded`` has been looked at; call it once for each, for only so many are made ahead."""
        self._reader.taken()

    def write(self, head: RecordHead, payload: bytes) -> bool:
        """Queue a record; ``Saved`` follows. False, and no event, once the tier is closing.

        How much is queued at a time is the caller's to bound: each payload stays in memory until its event.
        """
        return self._inbox.write(WriteJob(head, payload))

    def touch(self, ids: Sequence[RecordId]) -> None:
        """These were used now, the last one last. Stored within about a second."""
        self._inbox.touch(ids)

    def discard(self, ids: Sequence[RecordId]) -> None:
        """Remove records, and those that depend on them; ``Gone`` follows. A queued write of one is taken back."""
        self._inbox.discard(ids)

    def close(self, seconds: float) -> bool:
        """Refuse new writes, finish the queued ones within so many seconds, and end the threads.

        True when everything was written. Returns by the deadline also when a disk call does not: the threads are
        daemons, and what they leave is what a crash leaves.
        """
        deadline = time.monotonic() + seconds
        self._inbox.close(deadline)
        self._reader.close()
        written = self._writer.join(deadline)
        self._reader.join(deadline)
        return written

    @property
    def stats(self) -> SsdStats:
        """The counters now."""
        return self._tally.stats

    def _tell(self, event: SsdEvent) -> None:
        try:
            self._notify(event)
        except Exception:  # noqa: BLE001 - whose fault it is, the disk's threads go on
            _log.exception("an event was not taken")
        if isinstance(event, Opened):
            self._reader.allow()
