"""Responses that are kept, in an SQLite database: what was asked, what was answered, and which response came before.

Bounded in bytes and in age. What was used last goes last, and a response counts as used whenever one that goes on from
it is: so no conversation loses its beginning before its end. A connection belongs to the thread that opened it; several
processes may have the same database open.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

NAME = "responses-1.sqlite"
"""Another number where the tables are others."""
BUSY_SECONDS = 1.0
LONGEST_LINE = 32 * 1024 * 1024
"""Bytes of one conversation: more than any context has room for."""
_TABLES = (
    "CREATE TABLE IF NOT EXISTS responses(number INTEGER PRIMARY KEY, owner TEXT NOT NULL, id TEXT NOT NULL,"
    " previous TEXT NOT NULL, used REAL NOT NULL, bytes INTEGER NOT NULL, items BLOB NOT NULL, response BLOB NOT NULL,"
    " UNIQUE(owner, id))",
    "CREATE INDEX IF NOT EXISTS responses_by_use ON responses(used, number DESC, bytes)",
    "CREATE TABLE IF NOT EXISTS items(owner TEXT NOT NULL, id TEXT NOT NULL, response INTEGER NOT NULL"
    " REFERENCES responses(number) ON DELETE CASCADE, PRIMARY KEY(owner, id)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS items_by_response ON items(response)",
)
_ROW = "SELECT owner, id, previous, items, response FROM responses WHERE "
_FOUND = _ROW + "owner = ? AND id = ? AND used >= ?"
_FOUND_BY_ITEM = _ROW + "number = (SELECT response FROM items WHERE owner = ? AND id = ?) AND used >= ?"  # noqa: S608


class LineTooLong(Exception):  # noqa: N818 - it names what was found
    """A conversation has more bytes than ``LONGEST_LINE``."""


class Kept(msgspec.Struct, frozen=True):
    """One response."""

    owner: str
    """Whose it is; empty where there are no keys."""
    id: str
    previous: str
    """The one that it goes on from; empty: it begins a conversation."""
    items: bytes
    """JSON: the list of items that were asked, each with an id."""
    response: bytes
    """JSON: the whole answer."""

    @property
    def size(self) -> int:
        return len(self.items) + len(self.response)


class _Named(msgspec.Struct):
    id: str = ""


class _Answered(msgspec.Struct):
    output: list[_Named] = []


_NAMED = msgspec.json.Decoder(list[_Named])
_ANSWERED = msgspec.json.Decoder(_Answered)


class ResponseTable:
    """One open connection. Methods raise sqlite3.Error."""

    def __init__(self, path: Path | None, most_bytes: int, seconds: float) -> None:
        """``path``: None keeps them in memory. ``seconds``: how long after its last use one is kept; 0: no limit.
        Raises OSError."""
        self._most_bytes = most_bytes
        self._seconds = seconds
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # for its owner's eyes only
        self._db = sqlite3.connect(path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None)
        try:
            for setting in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "secure_delete = ON"):
                self._db.execute(f"PRAGMA {setting}")
            with self._transaction():
                for table in _TABLES:
                    self._db.execute(table)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def keep(self, kept: Kept) -> None:
        """Enter a response as the one used last, and let go what there is no room or no reason for any more."""
        asked = _NAMED.decode(kept.items)
        answered = _ANSWERED.decode(kept.response).output
        with self._transaction():
            now = time.time()
            number = self._db.execute(
                "INSERT INTO responses(owner, id, previous, used, bytes, items, response) VALUES(?, ?, ?, ?, ?, ?, ?)"
                " RETURNING number",
                (kept.owner, kept.id, kept.previous, now, kept.size, kept.items, kept.response),
            ).fetchone()[0]
            self._db.executemany(
                "INSERT OR REPLACE INTO items VALUES(?, ?, ?)",
                ((kept.owner, item.id, number) for item in (*asked, *answered) if item.id),
            )
            if self._seconds:
                self._db.execute("DELETE FROM responses WHERE used < ?", (now - self._seconds,))
            while self._bytes() > self._most_bytes:
                # Of those that were used together the newest, on which no other rests.
                self._db.execute(
                    "DELETE FROM responses WHERE number ="
                    " (SELECT number FROM responses ORDER BY used, number DESC LIMIT 1)"
                )

    def find(self, owner: str, id_: str) -> Kept | None:
        """The response of that id."""
        row = self._db.execute(_FOUND, (owner, id_, self._oldest())).fetchone()
        return None if row is None else Kept(*row)

    def with_item(self, owner: str, item: str) -> Kept | None:
        """The response that has asked or answered an item of that id."""
        row = self._db.execute(_FOUND_BY_ITEM, (owner, item, self._oldest())).fetchone()
        return None if row is None else Kept(*row)

    def line(self, owner: str, id_: str) -> list[Kept]:
        """A whole conversation from its beginning, which is used by that; empty where any of it is missing. Raises
        LineTooLong."""
        found: list[Kept] = []
        size = 0
        while id_:
            kept = self.find(owner, id_)
            if kept is None:
                return []
            size += kept.size
            if size > LONGEST_LINE:
                raise LineTooLong
            found.append(kept)
            id_ = kept.previous
        with self._transaction():
            now = time.time()
            self._db.executemany(
                "UPDATE responses SET used = max(used, ?) WHERE owner = ? AND id = ?",
                ((now, owner, kept.id) for kept in found),
            )
        return found[::-1]

    def forget(self, owner: str, id_: str) -> bool:
        """Whether there was one."""
        return self._db.execute("DELETE FROM responses WHERE owner = ? AND id = ?", (owner, id_)).rowcount > 0

    def _bytes(self) -> int:
        return int(self._db.execute("SELECT coalesce(sum(bytes), 0) FROM responses").fetchone()[0])

    def _oldest(self) -> float:
        return time.time() - self._seconds if self._seconds else 0.0

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # After some errors SQLite has already rolled back.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def remove(path: Path) -> None:
    """The database and what SQLite keeps beside it."""
    for end in ("", "-wal", "-shm"):
        with suppress(OSError):
            path.with_name(path.name + end).unlink()
