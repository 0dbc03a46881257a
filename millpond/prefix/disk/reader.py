"""Reading records: a few threads, and every check before a payload is handed out.

What is read stays where it was read to. Fresh memory comes page by page, which takes longer than any copy; here that is
in several threads, while the disk is waited for.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import NamedTuple

import numpy as np

from millpond.prefix.disk.block_file import PREFIX_BYTES, Damage, DamagedRecord, decode, layout
from millpond.prefix.disk.events import Loaded
from millpond.prefix.disk.files import Files
from millpond.prefix.disk.pool import record_path
from millpond.prefix.disk.stats import Tally
from millpond.prefix.records import Expected, RecordHead, RecordId

_log = logging.getLogger("millpond.prefix.disk.tier")

READERS = 2
AHEAD = 32
"""Records that are read and have not been taken: more would be memory that nobody counts, and with fewer the disk waits
while the engine puts some into their row."""


class Fault(NamedTuple):
    """A record that has to go from the index."""

    id: RecordId
    damaged: bool = False
    """Its file is to be set aside."""
    missing: bool = False
    """Its file was not there; otherwise it is not wanted, or cannot be read."""


class _ReadJob(NamedTuple):
    expected: Expected
    ticket: int


class DiskReader:
    """Answers each read with a Loaded event, in the order they were asked for as far as several threads keep it."""

    def __init__(
        self,
        folder: Path,
        namespace: str,
        files: Files,
        tally: Tally,
        tell: Callable[[Loaded], None],
        report: Callable[[Fault], None],
    ) -> None:
        self._folder = folder
        self._namespace = namespace
        self._files = files
        self._tally = tally
        self._tell = tell
        self._report = report
        self._jobs: SimpleQueue[_ReadJob | None] = SimpleQueue()
        self._ahead = Semaphore(AHEAD)
        self._ready = Event()
        self._closing = Event()
        self._threads = [Thread(target=self._run, name=f"ssd-read-{i}", daemon=True) for i in range(READERS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def allow(self) -> None:
        """Let the threads begin: no answer comes before the tier has said that it is open."""
        self._ready.set()

    def read(self, expected: Expected, ticket: int) -> None:
        self._jobs.put(_ReadJob(expected, ticket))

    def taken(self) -> None:
        """An answer has been looked at: another may be made."""
        self._ahead.release()

    def close(self) -> None:
        """Answer what is queued with a problem and end; a read that is under way is finished."""
        self._closing.set()
        self._ahead.release(READERS)
        for _ in self._threads:
            self._jobs.put(None)
        self._ready.set()

    def join(self, deadline: float) -> bool:
        """Wait for the threads until a moment of the monotonic clock. Whether they have ended."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        self._ready.wait()
        while (job := self._jobs.get()) is not None:
            self._ahead.acquire()
            if self._closing.is_set():
                self._ahead.release()
                self._fail(job, "the tier is closing")
                continue
            try:
                self._answer(job)
            except Exception:  # noqa: BLE001 - a fault of ours costs this read, not all later ones
                _log.exception("a read failed")
                self._fail(job, "internal error")

    def _answer(self, job: _ReadJob) -> None:
        expected = job.expected
        record = RecordId(expected.key, expected.kind)
        began = time.monotonic()
        try:
            head, payload = self._load(record_path(self._folder, self._namespace, record), expected)
        except FileNotFoundError:
            self._tally.add(missing=1)
            self._report(Fault(record, missing=True))
            problem = "the file is missing"
        except DamagedRecord as error:
            self._tally.add_damaged(error.damage)
            self._report(Fault(record, damaged=True))
            problem = f"damaged: {error}"
        except OSError as error:
            self._tally.add(read_errors=1)
            if error.errno == errno.EIO:
                # The medium has lost it. Other errors (no descriptors, no permission) are about us and may pass.
                self._report(Fault(record))
            problem = f"read error: {error}"
        except MemoryError:
            self._tally.add(read_errors=1)
            problem = "no memory for it"
        else:
            self._tally.add(reads=1, read_bytes=payload.nbytes)
            seconds = time.monotonic() - began
            self._tell(Loaded(job.ticket, record, head.tensors, payload, seconds))
            return
        self._fail(job, problem)

    def _load(self, path: Path, expected: Expected) -> tuple[RecordHead, memoryview]:
        """Read and verify a file, into memory of its own: what comes of it is kept as it is."""
        descriptor = self._files.open(path)
        try:
            size = self._files.size(descriptor)
            # A damaged length must not ask for gigabytes, so the file has to agree with itself first.
            prefix = bytearray(PREFIX_BYTES)
            found = self._files.fill(descriptor, memoryview(prefix))
            if layout(prefix[:found]).file_bytes != size:
                raise DamagedRecord(Damage.LENGTH, f"{size} bytes are not what the file says")
            view = np.empty(size, dtype=np.uint8).data
            view[:PREFIX_BYTES] = prefix
            count = PREFIX_BYTES + self._files.fill(descriptor, view[PREFIX_BYTES:])
        finally:
            self._files.close(descriptor)
        return decode(view[:count], self._namespace, expected)

    def _fail(self, job: _ReadJob, problem: str) -> None:
        self._tell(Loaded(job.ticket, RecordId(job.expected.key, job.expected.kind), problem=problem))
