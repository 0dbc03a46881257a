"""Counters of the SSD tier, for metrics."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping

import msgspec

from millpond.observe.log import fields
from millpond.prefix.disk.block_file import Damage

_log = logging.getLogger("millpond.prefix.disk.tier")

ALARM = 3
ALARM_SECONDS = 60.0
"""This many damaged files within this time are worth a warning."""


class SsdStats(msgspec.Struct, frozen=True, kw_only=True):
    """A moment's figures. ``files`` and ``bytes`` are of the whole folder; the rest counts since the start."""

    files: int = 0
    bytes: int = 0
    reads: int = 0
    read_bytes: int = 0
    read_errors: int = 0
    """Reads that the file system refused."""
    missing: int = 0
    """Reads of files that another process, or a user, had removed."""
    writes: int = 0
    written_bytes: int = 0
    write_errors: int = 0
    """Writes that the file system refused."""
    damaged: Mapping[Damage, int] = {}
    """Files set aside, by what was wrong with them."""
    evicted: int = 0
    expired: int = 0
    skipped_full: int = 0
    """Records not written for lack of room: cap, free-space floor, full disk."""
    skipped_daily: int = 0
    skipped_off: int = 0
    """Records not written while writes were off: read-only folder, disk or index in trouble, closing."""
    leftovers_removed: int = 0
    """Temporary files of dead processes."""
    adopted: int = 0
    """Files taken into the index by the sweep."""
    index_busy: int = 0
    """Times another process held the index for too long, and the work was put off."""
    index_rebuilt: int = 0
    index_errors: int = 0
    writing: bool = False
    """Whether writes are possible now."""


class Tally:
    """The counters while they are counted. Any thread; ``stats`` is always a whole snapshot."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._damaged_at: deque[float] = deque(maxlen=ALARM)
        self.stats = SsdStats()

    def add(self, **amounts: int) -> None:
        """Raise counters by their field names."""
        with self._lock:
            self.stats = msgspec.structs.replace(
                self.stats, **{name: getattr(self.stats, name) + amount for name, amount in amounts.items()}
            )

    def add_damaged(self, damage: Damage) -> None:
        """Count a damaged file, and warn when several come within a short time."""
        now = time.monotonic()
        with self._lock:
            counts = {**self.stats.damaged, damage: self.stats.damaged.get(damage, 0) + 1}
            self.stats = msgspec.structs.replace(self.stats, damaged=counts)
            self._damaged_at.append(now)
            alarm = len(self._damaged_at) == ALARM and now - self._damaged_at[0] < ALARM_SECONDS
            if alarm:
                self._damaged_at.clear()
        _log.info("a damaged record is set aside", extra=fields(reason=damage.value))
        if alarm:
            _log.warning("several damaged files within a minute: is the disk sound?", extra=fields(files=ALARM))

    def show(self, files: int, nbytes: int) -> None:
        """Set what the folder holds."""
        with self._lock:
            self.stats = msgspec.structs.replace(self.stats, files=files, bytes=nbytes)

    def show_writing(self, writing: bool) -> None:
        with self._lock:
            self.stats = msgspec.structs.replace(self.stats, writing=writing)
