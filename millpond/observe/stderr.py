"""A standard error that never holds up whoever writes to it.

Pipes are full when nobody reads them: a pager at rest, a log driver that blocks, a terminal on hold. Written to
directly, a line of log then stops the event loop or the engine. Here lines are queued, up to a limit, and one thread
writes them; what finds no room is dropped and counted, and the count is told once there is room again. Any thread.
"""

from __future__ import annotations

import io
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

MOST_WAITING = 1 << 20
"""Bytes that wait to be written; more are dropped."""
LAST_SECONDS = 0.5
"""How long the end of the process waits for its last lines to be taken."""


class PatientStderr(io.TextIOBase):
    """Takes the place of ``sys.stderr``. Each ``write`` is kept or dropped as a whole."""

    def __init__(self, descriptor: int, told: Callable[[int], str], most: int = MOST_WAITING) -> None:
        """``told`` makes the line that says how many writes were dropped; ``most`` in bytes."""
        self._descriptor = descriptor
        self._told = told
        self._most = most
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        """Of what waits, and of what is being written."""
        self._writing = False
        self._dropped = 0
        self._gone = False
        """Nobody will ever read it again."""
        self._changed = threading.Condition()
        threading.Thread(target=self._write_out, name="stderr", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "backslashreplace"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, text: str, /) -> int:
        """Queue it, or drop it. Never waits for a reader."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            if self._bytes + len(data) > self._most:
                self._dropped += not self._gone
            elif data:
                self._waiting.append(data)
                self._bytes += len(data)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Nothing: print and logging flush after every line, and must not wait either."""

    def drain(self, seconds: float = LAST_SECONDS) -> None:
        """Wait until everything is written, but not for longer."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while (self._waiting or self._dropped or self._writing) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)

    def _write_out(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                while not self._waiting and not self._dropped:
                    self._changed.wait()
                self._writing = True
                data = b"".join(self._waiting)
                self._waiting.clear()
                dropped, self._dropped = self._dropped, 0
            # What was dropped came behind everything that waited.
            self._put(data + (self._told(dropped).encode(errors="backslashreplace") if dropped else b""))
            with self._changed:
                self._bytes -= len(data)

    def _put(self, data: bytes) -> None:
        while data and not self._gone:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # somebody has made it so; for us that is no reason to lose anything
                select.select([], [self._descriptor], [])
            except OSError:
                self._gone = True
