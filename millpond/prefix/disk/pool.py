"""The records on disk: files and index together, and the order in which both change. One thread; may block.

A record is published file first, then row; it is removed row first, then file. So a process that dies at any point
leaves at most files that the index does not know and temporary files, which ``sweep`` takes in or removes. Among
several processes the index's write lock decides: a row is entered only while its file is seen, a file removed only
while it has no row.
What raises is sqlite3.Error, UnusableIndex and OSError; any method can be called again after that.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from millpond.observe.log import fields
from millpond.prefix.disk.age_clock import AgeClock
from millpond.prefix.disk.block_file import encode
from millpond.prefix.disk.events import DiskEntry
from millpond.prefix.disk.files import Files
from millpond.prefix.disk.index import DiskIndex, Row, Totals, UnusableIndex
from millpond.prefix.records import RecordHead, RecordId

_log = logging.getLogger("millpond.prefix.disk.tier")

WRITE_BYTES = 8 << 20
"""A record is written in pieces of this size; between two of them the write can be given up."""
QUARANTINE_FILES = 16
QUARANTINE_BYTES = 256 << 20
EVICT_AT_ONCE = 256
"""Rows removed in one transaction at most: another process waits for the index no longer than that takes."""
_INDEX = "index.sqlite"
_LOCK = "index.lock"
_QUARANTINE = "quarantine"
_NAMESPACE_DIGITS = 16
_OURS = re.compile(rf"index\..*|{_QUARANTINE}|[0-9a-f]{{{_NAMESPACE_DIGITS}}}")
"""Names of what there is in a folder of records."""


class WriteGivenUp(Exception):  # noqa: N818 - names what happened, not a fault
    """A write was stopped half-way because the tier is closing."""


def record_path(folder: Path, namespace: str, record: RecordId) -> Path:
    """Where a record's file is."""
    name = record.key.hex()
    return folder / namespace[:_NAMESPACE_DIGITS] / name[:2] / f"{name}.{record.kind}"


class DiskPool:
    """One folder of records."""

    def __init__(self, folder: Path, files: Files, clock: AgeClock, *, durable: bool = False) -> None:
        self.folder = folder
        self.files = files
        self.clock = clock
        self.read_only = True
        self._durable = durable
        self._index: DiskIndex | None = None
        self._identity: tuple[int, int] | None = None
        self._numbers = itertools.count(1)

    @property
    def is_open(self) -> bool:
        return self._index is not None

    @property
    def index(self) -> DiskIndex:
        assert self._index is not None, "the pool is closed"
        return self._index

    def open(self) -> bool:
        """Create what is missing and open the index; a broken one is set aside. True when it had to be made anew."""
        self.close()
        self.files.make_folder(self.folder)
        self._narrow()
        path = self.folder / _INDEX
        # Held by whoever replaces the index: nobody may open the old one meanwhile and write beside the new one.
        with self.files.locked(self.folder / _LOCK):
            missing = self.files.identity(path) is None
            try:
                self._open_index(path)
            except UnusableIndex:
                self._set_index_aside(path)
                self._open_index(path)
                return True
        return missing and bool(self.namespace_folders())

    def _narrow(self) -> None:
        """Keep other users out of the folder, unless there is more in it than ours: then say so."""
        if self.files.is_private(self.folder):
            return
        if all(map(_OURS.fullmatch, self.files.names(self.folder))):
            self.files.narrow(self.folder)
        if not self.files.is_private(self.folder):
            told = fields(folder=self.folder, remedy="chmod 700, or --cache-dir names a folder of its own")
            _log.warning("others may look into the folder of the SSD tier, or put files there", extra=told)

    def open_to_read(self) -> None:
        """Open without changing anything; the index stays closed when there is none that can be read."""
        self.close()
        path = self.folder / _INDEX
        if self.files.identity(path) is not None:
            # Without the index every record is still found by the sweep, from its file.
            with suppress(sqlite3.Error, UnusableIndex):
                self._index = DiskIndex(path, writable=False)

    def close(self) -> None:
        self.read_only = True
        if self._index is not None:
            self._index.close()
            self._index = None

    def replaced(self) -> bool:
        """Whether the index is not the file any more that was opened: removed, or set aside by another process."""
        return self.files.identity(self.folder / _INDEX) != self._identity

    def _open_index(self, path: Path) -> None:
        if self.files.identity(path) is None:
            # SQLite would create it with the modes of the umask; its other files follow this one.
            self.files.close(self.files.create(path))
        for beside in _beside(path):
            # SQLite would write where a planted link points to.
            if self.files.is_link(beside):
                self.files.remove(beside)
        self._index = DiskIndex(path, durable=self._durable)
        self._identity = self.files.identity(path)
        self.read_only = False

    def _set_index_aside(self, path: Path) -> None:
        self.quarantine(path)
        for beside in _beside(path):
            self.files.remove(beside)

    def path(self, row: Row) -> Path:
        return record_path(self.folder, row.namespace, row.id)

    def has_file(self, namespace: str, record: RecordId) -> bool:
        return self.files.identity(record_path(self.folder, namespace, record)) is not None

    def namespace_folders(self) -> list[str]:
        """Names of the folders that hold records."""
        return [name for name in self.files.folders(self.folder) if len(name) == _NAMESPACE_DIGITS]

    def totals(self) -> Totals:
        return self.index.totals() if self._index is not None else Totals(0, 0)

    def publish(self, head: RecordHead, namespace: str, payload: bytes, stop: Callable[[], bool]) -> DiskEntry:
        """Write a record's file under its name. Its row is the caller's next step.

        Raises WriteGivenUp when ``stop`` says so, and ValueError for a payload that does not fit its head.
        """
        pieces = encode(head, namespace, payload)
        final = record_path(self.folder, namespace, head.id)
        made = self.files.make_folder(final.parent)
        temporary, descriptor = self._create(final)
        try:
            try:
                for piece in pieces:
                    self._write(descriptor, memoryview(piece), stop)
                if self._durable:
                    self.files.sync(descriptor)
            finally:
                self.files.close(descriptor)
            self.files.publish(temporary, final)
        except BaseException:
            self.files.remove(temporary)
            raise
        if self._durable:
            for folder in {final.parent, *(path.parent for path in made)}:
                self.files.sync_folder(folder)
        return entry_of(head, sum(map(len, pieces)))

    def _create(self, final: Path) -> tuple[Path, int]:
        while True:
            temporary = final.with_name(f"{final.name}.{os.getpid()}.{next(self._numbers)}.tmp")
            try:
                return temporary, self.files.create(temporary)
            except FileExistsError:
                # Left by a process that had our number, or another tier of this one.
                continue
            except FileNotFoundError:
                # Another process removed the folder, empty as it was, after we had made sure of it.
                self.files.make_folder(final.parent)

    def _write(self, descriptor: int, data: memoryview, stop: Callable[[], bool]) -> None:
        while data:
            if stop():
                raise WriteGivenUp
            data = data[self.files.write(descriptor, data[:WRITE_BYTES]) :]

    def evict_to(self, limit: int, spared: Collection[bytes] = ()) -> list[Row]:
        """Remove least recently used leaves until ``limit`` bytes are left, or only those that are ``spared``."""
        removed: list[Row] = []
        while batch := self._evict_some(limit, spared):
            removed += batch
        return removed

    def _evict_some(self, limit: int, spared: Collection[bytes]) -> list[Row]:
        rows: list[Row] = []
        if self.index.totals().bytes > limit:
            with self.index.transaction():
                while len(rows) < EVICT_AT_ONCE and self.index.totals().bytes > limit:
                    found = self.index.oldest_leaves(spared)
                    if not found:
                        break
                    self.index.delete(found[0].id)
                    rows += found
            self._remove_files(rows)
        return rows

    def evict_files(self, nbytes: int) -> list[Row]:
        """Remove files before rows, for a disk so full that the index cannot grow by the record of a removal.

        Dying in between leaves rows without a file, which are misses until the sweep removes them.
        """
        chosen: list[Row] = []
        with self.index.transaction():
            for row in self.index.oldest_leaves(limit=EVICT_AT_ONCE):
                if nbytes <= 0:
                    break
                chosen.append(row)
                nbytes -= row.entry.nbytes
                self.files.remove(self.path(row))
                self.index.delete(row.id)
        return chosen

    def expire(self, before: float) -> list[Row]:
        """Remove records last used before a time, except those that younger ones depend on."""
        removed: list[Row] = []
        while True:
            with self.index.transaction():
                rows = self.index.expired_leaves(before, EVICT_AT_ONCE)
                for row in rows:
                    self.index.delete(row.id)
            self._remove_files(rows)
            removed += rows
            if not rows:
                return removed

    def drop(self, ids: Iterable[RecordId]) -> list[Row]:
        """Remove the rows of records that have no file, and all that depends on them."""
        rows: dict[RecordId, Row] = {}
        with self.index.transaction():
            for record in ids:
                known = self.index.get(record)
                if known is not None and self.has_file(known.namespace, known.id):
                    continue  # another process has written it since
                for row in self.index.with_dependents(record):
                    rows[row.id] = row
                    self.index.delete(row.id)
        self._remove_files(list(rows.values()))
        return list(rows.values())

    def remove(self, rows: Sequence[Row]) -> None:
        """Remove whole prompts, of which nothing stays that could depend on these."""
        for start in range(0, len(rows), EVICT_AT_ONCE):
            batch = rows[start : start + EVICT_AT_ONCE]
            with self.index.transaction():
                for row in batch:
                    self.index.delete(row.id)
            self._remove_files(batch)

    def quarantined(self) -> list[Path]:
        """The files that were set aside."""
        folder = self.folder / _QUARANTINE
        return [folder / info.name for info in self.files.listing(folder)]

    def _remove_files(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        # Another process may have published one of them anew. While we hold the index it cannot enter a row, so a file
        # without one may go: whoever wants to enter it then looks for the file first.
        with self.index.transaction():
            for row in rows:
                if self.index.get(row.id) is None:
                    self.files.remove(self.path(row))

    def quarantine(self, path: Path) -> None:
        """Set a damaged file aside for a look, and let the oldest of those there go."""
        folder = self.folder / _QUARANTINE
        self.files.make_folder(folder)
        try:
            self.files.publish(path, folder / f"{int(self.clock.now() * 1000):015d}-{path.name}")
        except FileNotFoundError:
            # Another process was faster.
            return
        kept = 0
        for number, info in enumerate(sorted(self.files.listing(folder), reverse=True)):
            kept += info.size
            if number >= QUARANTINE_FILES or kept > QUARANTINE_BYTES:
                self.files.remove(folder / info.name)


def _beside(index: Path) -> list[Path]:
    """The files that SQLite keeps beside an index."""
    return [index.with_name(index.name + suffix) for suffix in ("-wal", "-shm")]


def entry_of(head: RecordHead, nbytes: int) -> DiskEntry:
    """A record's entry; ``nbytes`` is the size of its file."""
    return DiskEntry(
        key=head.key, kind=head.kind, parent=head.parent, start=head.start, tokens=head.tokens, nbytes=nbytes
    )
