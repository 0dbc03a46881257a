"""The index of the SSD tier: an SQLite database that says which records are on disk and which one goes next.

Write-ahead log, one small transaction per batch. Children are counted by triggers, and the least recently used record
without children is the first entry of a partial index, so evicting costs O(log n) whatever the size of the pool.

What depends on a ``kv`` record, and so has to go before it: every record whose parent is its key, and the ``window``
and ``state`` records of its own key. Those two kinds have no children. A key is a hash over its namespace, so a child
is always of its parent's namespace.

A connection belongs to the thread that opened it. Several processes may have the same database open.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from millpond.prefix.disk.events import DiskEntry
from millpond.prefix.records import Kind, RecordId

SCHEMA = 1
APPLICATION = 0x4D504E44
"""Says in the file's header whose database it is (``MPND``)."""
BUSY_SECONDS = 1.0
"""How long a statement waits for another process before it gives up."""
KEPT_DAYS = 31
_ADOPTED = -(1 << 50)
"""Use counts of adopted records begin here: below all others, ordered by the time their files were written (ms)."""

_TABLES = """
CREATE TABLE namespaces(id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, label TEXT NOT NULL);
CREATE TABLE records(
    key BLOB NOT NULL, kind TEXT NOT NULL, namespace INTEGER NOT NULL, parent BLOB NOT NULL, start INTEGER NOT NULL,
    tokens BLOB NOT NULL, bytes INTEGER NOT NULL, used INTEGER NOT NULL, used_at REAL NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0, children INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(key, kind)
) WITHOUT ROWID;
CREATE INDEX records_by_parent ON records(parent);
CREATE INDEX leaves_by_use ON records(used) WHERE children = 0;
CREATE INDEX leaves_by_age ON records(used_at) WHERE children = 0;
CREATE TABLE totals(files INTEGER NOT NULL, bytes INTEGER NOT NULL, clock INTEGER NOT NULL);
INSERT INTO totals VALUES(0, 0, 0);
CREATE TABLE written(day INTEGER PRIMARY KEY, bytes INTEGER NOT NULL);
CREATE TRIGGER record_added AFTER INSERT ON records BEGIN
    UPDATE totals SET files = files + 1, bytes = bytes + new.bytes;
    UPDATE records SET children = children + 1 WHERE key = new.parent AND kind = 'kv';
    UPDATE records SET children = children + 1 WHERE key = new.key AND kind = 'kv' AND new.kind != 'kv';
    UPDATE records SET children = (SELECT count(*) FROM records WHERE parent = new.key)
        + (SELECT count(*) FROM records WHERE key = new.key AND kind != 'kv')
        WHERE key = new.key AND kind = 'kv' AND new.kind = 'kv';
END;
CREATE TRIGGER record_removed AFTER DELETE ON records BEGIN
    UPDATE totals SET files = files - 1, bytes = bytes - old.bytes;
    UPDATE records SET children = children - 1 WHERE key = old.parent AND kind = 'kv';
    UPDATE records SET children = children - 1 WHERE key = old.key AND kind = 'kv' AND old.kind != 'kv';
END;
CREATE TRIGGER record_resized AFTER UPDATE OF bytes ON records BEGIN
    UPDATE totals SET bytes = bytes + new.bytes - old.bytes;
END;
"""
_ROW = """SELECT n.digest, r.key, r.kind, r.parent, r.start, r.tokens, r.bytes, r.used_at
    FROM {source} JOIN namespaces n ON n.id = r.namespace """
_DEPENDENTS = """
WITH RECURSIVE doomed(key, kind) AS (
    VALUES(?, ?)
    UNION SELECT r.key, r.kind FROM doomed d JOIN records r ON r.parent = d.key WHERE d.kind = 'kv'
    UNION SELECT r.key, r.kind FROM doomed d JOIN records r ON r.key = d.key WHERE d.kind = 'kv'
) """


class UnusableIndex(Exception):  # noqa: N818 - names what was found
    """The file is not a sound index of this version; it can be set aside and made anew from the record files."""


class Row(NamedTuple):
    """One record of the index."""

    namespace: str
    """Digest, hex."""
    entry: DiskEntry
    used_at: float
    """Seconds since 1970, of the age clock."""

    @property
    def id(self) -> RecordId:
        return self.entry.id


class Totals(NamedTuple):
    """Of all namespaces together."""

    files: int
    bytes: int


class NamespaceUse(NamedTuple):
    """What one namespace has on disk."""

    digest: str
    label: str
    files: int
    bytes: int
    used_at: float


class DiskIndex:
    """One open connection. Methods raise sqlite3.Error; see ``is_busy`` and ``is_unsound``."""

    def __init__(self, path: Path, *, durable: bool = False, writable: bool = True) -> None:
        """Open the database, and create its tables in an empty file. Raises UnusableIndex, sqlite3.Error."""
        self._db = _connect(path, writable=writable)
        try:
            if writable:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                with self.transaction():
                    self._create()
            self._check()
        except sqlite3.Error as error:
            self._db.close()
            if is_unsound(error):
                raise UnusableIndex(str(error)) from error
            raise
        except UnusableIndex:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing. Takes the write lock at once, so that nothing is decided on what another process changes."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # After some errors SQLite has already rolled back.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _create(self) -> None:
        if not self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            for statement in _statements(_TABLES):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA application_id = {APPLICATION}")
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    def _check(self) -> None:
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) != (APPLICATION, SCHEMA):
            raise UnusableIndex(f"application {application:#x}, schema {version}: not ours or of another version")
        verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok" or self._db.execute("SELECT count(*) FROM totals").fetchone()[0] != 1:
            raise UnusableIndex(str(verdict))

    def name(self, digest: str, label: str) -> None:
        """Enter a namespace, or give a known one its label; an empty label leaves the known one."""
        self._db.execute(
            "INSERT INTO namespaces(digest, label) VALUES(?, ?) ON CONFLICT(digest) DO UPDATE"
            " SET label = excluded.label WHERE excluded.label != '' AND excluded.label != label",
            (digest, label),
        )

    def put(self, namespace: str, entry: DiskEntry, used_at: float) -> None:
        """Enter a record that was just written, as the one used last."""
        self._insert(namespace, entry, self._tick(), used_at)

    def adopt(self, namespace: str, entry: DiskEntry, used_at: float) -> None:
        """Enter a record whose use is not known: older than any other, and than adopted ones with a later time."""
        self._insert(namespace, entry, _ADOPTED + int(used_at * 1000), used_at)

    def _insert(self, namespace: str, entry: DiskEntry, used: int, used_at: float) -> None:
        self.name(namespace, "")
        self._db.execute(
            "INSERT INTO records(key, kind, namespace, parent, start, tokens, bytes, used, used_at)"
            " VALUES(?, ?, (SELECT id FROM namespaces WHERE digest = ?), ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT(key, kind) DO UPDATE"
            " SET bytes = excluded.bytes, used = excluded.used, used_at = excluded.used_at",
            (
                *(entry.key, entry.kind.value, namespace, entry.parent, entry.start, entry.tokens, entry.nbytes),
                *(used, used_at),
            ),
        )

    def touch(self, ids: Iterable[RecordId], used_at: float) -> None:
        """Records were used, the last one last."""
        for key, kind in ids:
            self._db.execute(
                "UPDATE records SET used = ?, used_at = ?, hits = hits + 1 WHERE key = ? AND kind = ?",
                (self._tick(), used_at, key, kind.value),
            )

    def _tick(self) -> int:
        # A counter, not the time: the order of uses must survive clocks that are set back.
        return int(self._db.execute("UPDATE totals SET clock = clock + 1 RETURNING clock").fetchone()[0])

    def delete(self, record: RecordId) -> None:
        self._db.execute("DELETE FROM records WHERE key = ? AND kind = ?", (record.key, record.kind.value))

    def get(self, record: RecordId) -> Row | None:
        found = self._rows("records r", "WHERE r.key = ? AND r.kind = ?", (record.key, record.kind.value))
        return found[0] if found else None

    def with_dependents(self, record: RecordId) -> list[Row]:
        """A record, if it is in the index, and all that are of no use without it."""
        source = "doomed d JOIN records r ON r.key = d.key AND r.kind = d.kind"
        cursor = self._db.execute(_DEPENDENTS + _ROW.format(source=source), (record.key, record.kind.value))
        return [_row(values) for values in cursor]

    def oldest_leaves(self, spared: Collection[bytes] = (), limit: int = 1) -> list[Row]:
        """The least recently used records without children whose key is not ``spared``."""
        marks = ",".join("?" * len(spared))
        return self._rows(
            "records r INDEXED BY leaves_by_use",
            f"WHERE r.children = 0 AND r.key NOT IN ({marks}) ORDER BY r.used LIMIT ?",
            (*spared, limit),
        )

    def expired_leaves(self, before: float, limit: int = 1) -> list[Row]:
        """Records without children that were last used before a time."""
        return self._rows(
            "records r INDEXED BY leaves_by_age",
            "WHERE r.children = 0 AND r.used_at < ? ORDER BY r.used_at LIMIT ?",
            (before, limit),
        )

    def entries(self, namespace: str | None = None, used_after: float = float("-inf")) -> list[Row]:
        """All records, or those of one namespace, parents before their children."""
        return self._rows(
            "records r",
            "WHERE (? IS NULL OR n.digest = ?) AND r.used_at >= ? ORDER BY r.start",
            (namespace, namespace, used_after),
        )

    def shard(self, first: int) -> list[Row]:
        """Records whose key begins with a byte: a 256th of all."""
        after = bytes([first + 1]) if first < 255 else b"\xff" * 33
        return self._rows("records r", "WHERE r.key >= ? AND r.key < ?", (bytes([first]), after))

    def shift_ages(self, jump: float, now: float) -> None:
        """The clock was set by ``jump`` seconds: ages stay what they were, or become less, and none is negative."""
        self._db.execute("UPDATE records SET used_at = min(used_at + ?, ?)", (max(0.0, jump), now))

    def totals(self) -> Totals:
        return Totals(*self._db.execute("SELECT files, bytes FROM totals").fetchone())

    def use_by_namespace(self) -> list[NamespaceUse]:
        """Every namespace that has records, the one used last first."""
        cursor = self._db.execute(
            "SELECT n.digest, n.label, count(*), sum(r.bytes), max(r.used_at) FROM records r"
            " JOIN namespaces n ON n.id = r.namespace GROUP BY n.id ORDER BY max(r.used_at) DESC"
        )
        return [NamespaceUse(*values) for values in cursor]

    def written(self, day: int) -> int:
        """Bytes written on a day (days since 1970, UTC), by all processes."""
        found = self._db.execute("SELECT bytes FROM written WHERE day = ?", (day,)).fetchone()
        return int(found[0]) if found else 0

    def add_written(self, day: int, nbytes: int) -> None:
        self._db.execute(
            "INSERT INTO written VALUES(?, ?) ON CONFLICT(day) DO UPDATE SET bytes = bytes + excluded.bytes",
            (day, nbytes),
        )
        self._db.execute("DELETE FROM written WHERE day < ?", (day - KEPT_DAYS,))

    def _rows(self, source: str, rest: str, values: Sequence[object]) -> list[Row]:
        return [_row(found) for found in self._db.execute(_ROW.format(source=source) + rest, values)]


def is_busy(error: sqlite3.Error) -> bool:
    """Another process holds the database: worth another try."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_full(error: sqlite3.Error) -> bool:
    """The disk has no room for the database to grow."""
    return _code(error) == sqlite3.SQLITE_FULL


def is_unsound(error: sqlite3.Error) -> bool:
    """The file is no database, a broken one, or lacks our tables."""
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)


def _code(error: sqlite3.Error) -> int | None:
    # Errors of the Python module itself have no code. The low byte is the primary one.
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    if writable:
        return sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    uri = path.absolute().as_uri()
    try:
        return _connect_to_read(f"{uri}?mode=ro")
    except sqlite3.Error:
        # The write-ahead log needs a file of shared memory, which cannot be made on a read-only file system.
        return _connect_to_read(f"{uri}?immutable=1")


def _connect_to_read(uri: str) -> sqlite3.Connection:
    db = sqlite3.connect(uri, timeout=BUSY_SECONDS, isolation_level=None, uri=True)
    try:
        db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db


def _statements(script: str) -> Iterator[str]:
    """One by one, because executescript would end the transaction they belong to."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _row(values: tuple[str, bytes, str, bytes, int, bytes, int, float]) -> Row:
    digest, key, kind, parent, start, tokens, nbytes, used_at = values
    entry = DiskEntry(key=key, kind=Kind(kind), parent=parent, start=start, tokens=tokens, nbytes=nbytes)
    return Row(digest, entry, used_at)
