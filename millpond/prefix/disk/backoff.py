"""When the SSD tier tries again after a failure: pauses that grow with failures in a row, and what they mean."""

from __future__ import annotations

import errno
import logging
import sqlite3
import time

from millpond.observe.log import fields
from millpond.prefix.disk.index import UnusableIndex, is_busy, is_full, is_unsound
from millpond.prefix.disk.stats import Tally

_log = logging.getLogger("millpond.prefix.disk.tier")

BUSY_SECONDS = 0.25
"""Pause after another process has held the index for too long."""
BACKOFF_SECONDS = (1.0, 2.0, 5.0, 15.0, 30.0)
"""Seconds without writes after the first, second, ... failure in a row."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Backoff:
    """The state between a failure and the next try. One thread."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._failures = 0
        self.reason = ""
        """Why writes are refused; empty while they are only put off, or go on."""
        self.until = 0.0
        """Nothing is changed before this moment of the monotonic clock; 0 when nothing failed."""
        self.reopen = False
        """Whether what failed may be the open index, or may have left it behind the files."""

    @property
    def active(self) -> bool:
        return time.monotonic() < self.until

    def begin(self, error: Exception) -> bool:
        """Pause for an error. True when writes are to be refused, False when what is queued can wait."""
        # A lock file that is held: another process is replacing the index.
        if isinstance(error, BlockingIOError) or (isinstance(error, sqlite3.Error) and is_busy(error)):
            self._tally.add(index_busy=1)
            self.until = time.monotonic() + BUSY_SECONDS
            return False
        if isinstance(error, sqlite3.Error | UnusableIndex):
            self._tally.add(index_errors=1)
        full = no_space(error)
        self.reason = f"the disk is full: {error}" if full else str(error) or type(error).__name__
        self.reopen = self.reopen or not full or isinstance(error, sqlite3.Error)
        seconds = BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]
        if not self._failures:
            _log.warning("the SSD tier stops writing for now", extra=fields(reason=self.reason))
            if isinstance(error, sqlite3.Error) and is_unsound(error):
                # Opening sets a broken index aside; no need to wait for that, once.
                seconds = 0.0
        self._failures += 1
        self.until = time.monotonic() + seconds
        return True

    def end(self) -> bool:
        """The next try begins; whether everything is to be opened anew for it."""
        reopen = self.reopen
        self.reason, self.until, self.reopen = "", 0.0, False
        return reopen

    def succeeded(self) -> None:
        """Something was written: the next failure is the first again."""
        self._failures = 0


def no_space(error: Exception) -> bool:
    """Whether an error means that the disk, or the user's quota, is full."""
    if isinstance(error, sqlite3.Error):
        return is_full(error)
    return isinstance(error, OSError) and error.errno in _FULL
