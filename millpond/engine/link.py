"""The engine's end of the socket: a thread that reads messages and a thread that writes them.

They see messages only, never MLX. The engine thread takes from ``inbox`` and calls ``send``; a load report (Beat) is an
immutable object that it hands over whole with ``report``. A front end that can no longer be understood makes the inbox
end with a Stop; one that is gone leaves nothing to do, whatever the engine is busy with.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from millpond.engine.grammars import Compiled
from millpond.engine.orders import Offered
from millpond.prefix.disk.events import SsdEvent
from millpond.wire import HEADER, Beat, FromEngine, Stop, ToEngine, WireError, decode_to_engine, encode, frame_length

BEAT_SECONDS = 0.5

Inbox = queue.SimpleQueue[ToEngine | SsdEvent | Offered | Compiled]
"""What the engine thread takes from: messages of the front end, what the SSD tier's threads have to say, what other
ranks offer, and grammars that have been compiled."""


class Outbox(Protocol):
    """Where the engine thread puts what it has to say."""

    def send(self, message: FromEngine) -> None: ...

    def report(self, beat: Beat) -> None: ...


class FrontEndLink:
    """Serves one connected socket until the front end closes it."""

    def __init__(self, connection: socket.socket, lost: Callable[[], None] = lambda: None) -> None:
        """``lost`` is called, in the reading thread, when the front end is gone."""
        self.inbox: Inbox = queue.SimpleQueue()
        self._connection = connection
        self._lost = lost
        self._outgoing: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._beat = Beat(step=0, running=0, waiting=0, kv_bytes=0)
        self._reader = threading.Thread(target=self._read, name="link-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="link-writer", daemon=True)

    def start(self) -> None:
        self._reader.start()
        self._writer.start()

    def send(self, message: FromEngine) -> None:
        """Queue a message. Never blocks; what waits is bounded by the answers under way."""
        self._outgoing.put(message)

    def report(self, beat: Beat) -> None:
        self._beat = beat

    def close(self) -> None:
        """Write out what is queued, then stop writing. Waits at most a second."""
        self._outgoing.put(None)
        self._writer.join(timeout=1.0)

    def _read(self) -> None:
        try:
            for body in _frames(self._connection):
                self.inbox.put(decode_to_engine(body))
            self._lost()
        except OSError:
            self._lost()
        except WireError:
            pass  # it lives, but there is no working for it: the Stop below says so
        finally:
            self.inbox.put(Stop())

    def _write(self) -> None:
        next_beat = time.monotonic()
        while True:
            try:
                message = self._outgoing.get(timeout=max(0.0, next_beat - time.monotonic()))
                if message is None:
                    return
            except queue.Empty:
                message = self._beat
                next_beat = time.monotonic() + BEAT_SECONDS
            try:
                self._connection.sendall(encode(message))
            except OSError:
                return  # the reader sees the same end and stops the engine


def _frames(connection: socket.socket) -> Iterator[bytes]:
    with connection.makefile("rb") as stream:
        while header := stream.read(HEADER.size):
            if len(header) < HEADER.size:
                return
            length = frame_length(header)
            body = stream.read(length)
            if len(body) < length:
                return
            yield body
