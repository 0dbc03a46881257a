"""The thread that changes the SSD tier: removals first, then writes, then upkeep and the sweep.

Nothing that the disk or the database does ends it. What fails is reported and counted; then writes are refused for a
short while, longer each time, and everything is opened anew. Removals and rows that could not be stored are kept.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from threading import Thread
from typing import NamedTuple

from millpond.observe.log import fields
from millpond.prefix.disk.backoff import Backoff, no_space
from millpond.prefix.disk.block_file import file_bytes
from millpond.prefix.disk.events import DiskEntry, Found, Gone, Opened, Saved, SsdEvent
from millpond.prefix.disk.inbox import Inbox, Taken, WriteJob
from millpond.prefix.disk.index import Row, UnusableIndex
from millpond.prefix.disk.limits import LimitKeeper
from millpond.prefix.disk.pool import DiskPool, WriteGivenUp, record_path
from millpond.prefix.disk.reader import Fault
from millpond.prefix.disk.stats import Tally
from millpond.prefix.disk.sweep import Swept, sweep
from millpond.prefix.records import RecordId
from millpond.settings import PrefixSettings, SavePolicy

_log = logging.getLogger("millpond.prefix.disk.tier")

BATCH = 16
"""Writes whose rows share a transaction, at most."""
BATCH_BYTES = 64 << 20
"""Bytes written until their rows are entered, so that the engine gets its memory back."""
OPEN_SECONDS = 5.0
"""How long other processes may keep the tier from opening until it says that it is empty."""
TOUCH_SECONDS = 1.0
"""How long uses are gathered before they are stored."""
CLOSING = "the tier is closing"
ELSEWHERE = "--cache-dir names another folder, --cache-ssd 0 does without"
READ_ONLY = "the folder cannot be written to"
REMOVED = "another server removed its file at once"
MOST_FAULTS = 10_000
"""Removals remembered while nothing can be removed; a later read or the sweep finds the rest again."""


class _Published(NamedTuple):
    """A file that has its name, and waits for its row."""

    entry: DiskEntry
    written: int
    """Bytes; 0 when the file was there already."""


class DiskWriter:
    """Owns the pool. ``tell`` is called from this thread only."""

    def __init__(
        self,
        pool: DiskPool,
        inbox: Inbox,
        namespace: str,
        settings: PrefixSettings,
        tally: Tally,
        tell: Callable[[SsdEvent], None],
        *,
        upkeep_seconds: float,
    ) -> None:
        self._pool = pool
        self._inbox = inbox
        self._namespace = namespace
        self._label = settings.label
        self._may_write = settings.ssd_policy is not SavePolicy.OFF
        self._tally = tally
        self._tell = tell
        self._keeper = LimitKeeper(pool, settings, tally, self._removed)
        self._upkeep_seconds = upkeep_seconds
        self._started = pool.clock.now()
        self._writes: deque[WriteJob] = deque()
        self._faults: dict[RecordId, Fault] = {}
        self._touched: dict[RecordId, None] = {}
        self._rows: list[_Published] = []
        self._sweep: Iterator[Swept] | None = None
        self._backoff = Backoff(tally)
        self._opened = False
        self._at_job = False  # The first of the queued writes is being worked on.
        self._touch_at = 0.0
        self._upkeep_at = 0.0
        self._lost_writes = False
        self._thread = Thread(target=self._run, name="ssd-write", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, deadline: float) -> bool:
        """Wait until a moment of the monotonic clock; whether the thread has ended and everything was written."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive() and not self._lost_writes

    def _run(self) -> None:
        self._guarded(self._open)
        patience = time.monotonic() + OPEN_SECONDS
        while self._backoff.until and not self._backoff.reason and self._inbox.deadline is None:
            # Another process is opening the folder, or is busy with it: it will not be for long.
            if self._backoff.until > patience:
                break
            self._absorb(self._inbox.take(self._backoff.until, BATCH))
            if not self._backoff.active:
                self._backoff.end()
                self._guarded(self._open)
        if self._backoff.reason:
            told = fields(reason=self._backoff.reason, folder=self._pool.folder, remedy=ELSEWHERE)
            _log.warning("prefixes are kept in memory only, for now", extra=told)
        self._say(Opened(self._keeper.valid(self._namespace), self._problem()))
        self._opened = True
        while self._inbox.deadline is None:
            self._absorb(self._inbox.take(self._wake_at(), BATCH - len(self._writes)))
            self._guarded(self._cycle)
        self._finish()

    def _wake_at(self) -> float:
        now = time.monotonic()
        if self._backoff.active:
            return self._backoff.until
        if self._sweep is not None or self._writes or self._rows or self._backoff.until:
            return now
        return min(self._upkeep_at, self._touch_at if self._touched else self._upkeep_at)

    def _absorb(self, batch: Taken) -> None:
        self._writes += batch.writes
        if batch.touched and not self._touched:
            self._touch_at = time.monotonic() + TOUCH_SECONDS
        for record in batch.touched:
            self._touched.pop(record, None)
            self._touched[record] = None
        for fault in batch.faults:
            if len(self._faults) < MOST_FAULTS:
                self._faults.setdefault(fault.id, fault)
        for job in batch.cancelled:
            self._say(Saved(job.head.id, 0, "discarded"))

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do some work; what the disk or the database raises becomes a pause."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end the thread; it is logged
            if not isinstance(error, sqlite3.Error | UnusableIndex | OSError):
                _log.exception("the SSD tier failed")
            self._trouble(error)
        self._show()

    def _say(self, event: SsdEvent) -> None:
        """Tell the engine; whoever looks at the stats then sees what the event is about."""
        self._show()
        self._tell(event)

    def _show(self) -> None:
        writing = not self._backoff.reason and not self._pool.read_only and self._may_write
        with suppress(sqlite3.Error):
            self._tally.show(*self._pool.totals())
        self._tally.show_writing(writing)

    def _cycle(self) -> None:
        if self._backoff.active:
            if self._backoff.reason:
                self._refuse(self._backoff.reason)
                # The engine need not wait for the removal to know that these cannot be read.
                self._gone(self._faults)
            return
        if self._backoff.until and (self._backoff.end() or not self._pool.is_open):
            self._open_again()
        if self._pool.read_only:
            self._only_read()
        else:
            if self._pool.replaced():
                self._open_again()
            self._change()
        if self._sweep is not None:
            self._sweep_step(self._sweep)

    def _only_read(self) -> None:
        self._refuse(READ_ONLY if self._may_write else "writes are off")
        self._give_up_rows()
        self._gone(self._faults)
        self._faults.clear()
        self._touched.clear()
        if time.monotonic() >= self._upkeep_at:
            self._upkeep_at = time.monotonic() + self._upkeep_seconds
            if self._may_write and self._pool.files.writable(self._pool.folder):
                self._open_again()

    def _change(self) -> None:
        self._store_rows()
        self._drop_faults()
        closing = self._inbox.deadline is not None
        if closing or self._writes or time.monotonic() >= self._touch_at:
            self._store_touches()
        self._write_queued()
        if not closing and time.monotonic() >= self._upkeep_at:
            self._upkeep()

    def _open(self) -> None:
        """Open the folder in the best way there is, and hold its limits before anything is offered."""
        self._touch_at = 0.0
        self._sweep = sweep(self._pool, self._started)
        if not self._may_write or not self._pool.files.writable(self._pool.folder):
            self._upkeep_at = time.monotonic() + self._upkeep_seconds
            self._pool.open_to_read()
            if self._may_write:
                told = fields(reason=READ_ONLY, folder=self._pool.folder, remedy=ELSEWHERE)
                _log.warning("the SSD tier only reads", extra=told)
            return
        if self._pool.open():
            self._tally.add(index_rebuilt=1)
            _log.warning("the index of the SSD tier is made anew", extra=fields(folder=self._pool.folder))
        index = self._pool.index
        with index.transaction():
            index.name(self._namespace, self._label)
            index.shift_ages(0.0, self._pool.clock.now())
        self._upkeep()

    def _open_again(self) -> None:
        known = {entry.id for entry in self._keeper.valid(self._namespace)}
        self._open()
        entries = self._keeper.valid(self._namespace)
        self._gone(known - {entry.id for entry in entries})
        self._found(entry for entry in entries if entry.id not in known)

    def _problem(self) -> str:
        """Why the tier cannot be used in full; empty when it can."""
        if self._backoff.reason or not self._may_write:
            return self._backoff.reason
        if not self._pool.read_only:
            return ""
        return "the index is held by another process" if self._backoff.until else READ_ONLY

    def _upkeep(self) -> None:
        self._upkeep_at = time.monotonic() + self._upkeep_seconds
        self._keeper.hold_all()

    def _trouble(self, error: Exception) -> None:
        at_job, self._at_job = self._at_job, False
        if self._backoff.begin(error):
            if at_job:
                self._skip(self._writes.popleft(), str(error), write_errors=1)
            self._refuse(self._backoff.reason)
        if no_space(error):
            try:
                self._keeper.shrink()
            except (sqlite3.Error, OSError) as again:
                _log.warning("no room could be made", extra=fields(error=again))

    def _refuse(self, reason: str) -> None:
        """Answer what is queued instead of keeping its payload in memory."""
        for job in self._writes:
            self._skip(job, reason, skipped_off=1)
        self._writes.clear()

    def _skip(self, job: WriteJob, reason: str, **counter: int) -> None:
        self._lost_writes = True
        self._tally.add(**counter)
        self._say(Saved(job.head.id, 0, reason))

    def _drop_faults(self) -> None:
        if not self._faults:
            return
        for fault in self._faults.values():
            path = record_path(self._pool.folder, self._namespace, fault.id)
            if fault.damaged:
                self._pool.quarantine(path)
            elif not fault.missing:
                self._pool.files.remove(path)
        # What has a file now was written by another server since.
        rows = [row.id for row in self._pool.drop(self._faults) if row.namespace == self._namespace]
        self._gone({*rows, *(record for record in self._faults if not self._pool.has_file(self._namespace, record))})
        self._faults.clear()

    def _store_touches(self) -> None:
        if self._touched:
            with self._pool.index.transaction():
                self._pool.index.touch(self._touched, self._pool.clock.now())
            self._touched.clear()

    def _write_queued(self) -> None:
        # Removals that come meanwhile go first.
        while self._writes and not self._late() and not self._inbox.faulty:
            job = self._writes[0]
            self._at_job = True
            try:
                self._write(job)
            except ValueError as error:
                self._skip(job, str(error), write_errors=1)
            except WriteGivenUp:
                self._skip(job, CLOSING, skipped_off=1)
            except OSError as error:
                if error.errno != errno.EFBIG:
                    raise
                # This one is too large for the file system or a limit of the process; others may fit.
                self._skip(job, str(error), write_errors=1)
            self._at_job = False
            self._writes.popleft()
            if self._under_way() > BATCH_BYTES:
                self._store_rows()
        self._store_rows()

    def _write(self, job: WriteJob) -> None:
        """Write one record's file, unless there is no room for it or it is there already."""
        pool = self._pool
        if (known := pool.index.get(job.head.id)) and pool.has_file(self._namespace, known.id):
            self._rows.append(_Published(known.entry, 0))
            return
        size = file_bytes(job.head, self._namespace)
        if not self._keeper.within_budget(self._under_way() + size):
            self._skip(job, "the daily budget is used up", skipped_daily=1)
            return
        if not self._fits(job, size):
            # With their rows, those published just before can make room too.
            self._store_rows()
            if not self._fits(job, size):
                self._skip(job, "no room for it", skipped_full=1)
                return
        entry = pool.publish(job.head, self._namespace, job.payload, self._late)
        self._rows.append(_Published(entry, entry.nbytes))

    def _under_way(self) -> int:
        """Bytes of files that wait for their row."""
        return sum(published.written for published in self._rows)

    def _fits(self, job: WriteJob, size: int) -> bool:
        # Neither what this record depends on, nor what those do that have no row yet, may make room for it.
        spared = {job.head.parent, job.head.key}
        for published in self._rows:
            spared |= {published.entry.parent, published.entry.key}
        return self._keeper.make_room(size, self._under_way(), spared)

    def _store_rows(self) -> None:
        """Enter published files into the index, all in one transaction, and say so."""
        if not self._rows:
            return
        index, clock = self._pool.index, self._pool.clock
        entered: set[RecordId] = set()
        with index.transaction():
            index.name(self._namespace, self._label)
            for entry, _ in self._rows:
                if self._pool.has_file(self._namespace, entry.id):
                    index.put(self._namespace, entry, clock.now())
                    entered.add(entry.id)
            written = self._under_way()
            if written:
                index.add_written(clock.day(), written)
        self._backoff.succeeded()
        self._tally.add(writes=sum(published.written > 0 for published in self._rows), written_bytes=written)
        done, self._rows = self._rows, []
        for entry, _ in done:
            self._say(Saved(entry.id, entry.nbytes) if entry.id in entered else Saved(entry.id, 0, REMOVED))
        # Another process may have used the same room.
        self._keeper.hold_cap()

    def _give_up_rows(self) -> None:
        """The files are there, and the next sweep that can write will find them."""
        for published in self._rows:
            self._lost_writes = True
            self._say(Saved(published.entry.id, published.entry.nbytes, "the index could not be written"))
        self._rows.clear()

    def _sweep_step(self, steps: Iterator[Swept]) -> None:
        try:
            step = next(steps, None)
        except (sqlite3.Error, OSError):
            # A generator that has raised is at its end: begin again.
            self._sweep = sweep(self._pool, self._started)
            raise
        if step is None:
            self._sweep = None
            return
        self._tally.add(adopted=0 if self._pool.read_only else len(step.adopted), leftovers_removed=step.leftovers)
        for damage in step.damaged:
            self._tally.add_damaged(damage)
        self._found(row.entry for row in step.adopted if row.namespace == self._namespace)
        self._removed(step.lost)
        if not self._pool.read_only:
            self._keeper.hold_cap()

    def _removed(self, rows: Sequence[Row]) -> None:
        self._gone(row.id for row in rows if row.namespace == self._namespace)

    def _found(self, entries: Iterable[DiskEntry]) -> None:
        if listed := list(entries):
            self._say(Found(listed))

    def _gone(self, ids: Iterable[RecordId]) -> None:
        # Before Opened nothing is known to the engine that could be gone.
        if self._opened and (listed := list(ids)):
            self._say(Gone(listed))

    def _late(self) -> bool:
        """Whether the tier is closing and its time is up."""
        deadline = self._inbox.deadline
        return deadline is not None and time.monotonic() >= deadline

    def _finish(self) -> None:
        """Do what is queued as far as the time allows, and answer the rest."""
        self._lost_writes = False
        while True:
            self._absorb(self._inbox.take(0.0, BATCH))
            if self._late() or self._backoff.reason or self._pool.read_only:
                break
            if not (self._writes or self._rows or self._faults or self._touched):
                break
            self._guarded(self._change)
        while (batch := self._inbox.take(0.0, BATCH)).writes:
            self._absorb(batch)
        self._refuse(CLOSING)
        self._give_up_rows()
        try:
            self._pool.close()
        except sqlite3.Error as error:
            _log.warning("closing the index failed", extra=fields(error=error))
