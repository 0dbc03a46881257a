"""The responses that a server keeps, for those who go on from them or ask for them again.

One thread has the database, so that neither the event loop nor a text thread waits for a disk, and whoever asks finds
what was kept before. An error of the disk costs what was to be kept, never an answer.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from millpond.http.response_table import Kept, ResponseTable, remove
from millpond.http.threads import Threads
from millpond.observe.log import fields

log = logging.getLogger("millpond.http")

T = TypeVar("T")

MOST_BEHIND = 64 * 1024 * 1024
"""Bytes that may wait for the disk; what comes on top is not kept."""
CLOSE_SECONDS = 2.0
_UNSOUND = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


class ResponseStore:
    """Any thread may ask; what is asked for first is done first."""

    def __init__(self, path: Path | None, most_bytes: int, seconds: float) -> None:
        """``path``: of the database; None: in memory. ``most_bytes``: 0 keeps nothing."""
        self.most_bytes = most_bytes
        self._path = path
        self._seconds = seconds
        self._thread = Threads(1, "responses")
        self._table: ResponseTable | None = None
        """The thread's own; opened when it is first needed."""
        self._behind: deque[tuple[Future[None], int]] = deque()

    def keep(self, kept: Kept) -> None:
        """Event loop only; does not wait."""
        while self._behind and self._behind[0][0].done():
            self._behind.popleft()
        if kept.size > self.most_bytes or kept.size + sum(size for _, size in self._behind) > MOST_BEHIND:
            log.warning("a response is too large to be kept, or the disk too slow", extra=fields(bytes=kept.size))
            return
        self._behind.append((self._ask(lambda table: table.keep(kept), None), kept.size))

    def find(self, owner: str, id_: str) -> Future[Kept | None]:
        """The response of that id, if it is kept."""
        return self._ask(lambda table: table.find(owner, id_), None)

    def with_item(self, owner: str, item: str) -> Future[Kept | None]:
        """The response that has an item of that id."""
        return self._ask(lambda table: table.with_item(owner, item), None)

    def line(self, owner: str, id_: str) -> Future[list[Kept]]:
        """A whole conversation from its beginning; empty where any of it is missing. The result raises LineTooLong."""
        nothing: list[Kept] = []
        return self._ask(lambda table: table.line(owner, id_), nothing)

    def forget(self, owner: str, id_: str) -> Future[bool]:
        """Whether there was one."""
        return self._ask(lambda table: table.forget(owner, id_), False)

    def close(self) -> None:
        """Write what waits, for a moment at most."""
        closing = self._thread.submit(self._close)
        self._thread.close()
        with suppress(TimeoutError):
            closing.result(CLOSE_SECONDS)

    def _ask(self, work: Callable[[ResponseTable], T], otherwise: T) -> Future[T]:
        def run() -> T:
            if not self.most_bytes:
                return otherwise
            try:
                if self._table is None:
                    self._table = ResponseTable(self._path, self.most_bytes, self._seconds)
                return work(self._table)
            except (sqlite3.Error, OSError) as error:
                log.warning("responses cannot be kept or read", extra=fields(path=self._path, reason=error))
                if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _UNSOUND:
                    self._begin_anew()
                return otherwise

        return self._thread.submit(run)

    def _begin_anew(self) -> None:
        """The file is no database, or a broken one."""
        self._close()
        if self._path is not None:
            remove(self._path)

    def _close(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None
