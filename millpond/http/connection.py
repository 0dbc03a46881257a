"""A client's connection: how many there may be, how long it may take to say what it wants, and how it is cut.

uvicorn closes a connection after writing what is still buffered, which a client that reads nothing prevents for ever,
and it gives a client that never finishes its headers all the time in the world. Event loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from millpond.http.context import RequestContext, context_of
from millpond.http.errors import ApiError
from millpond.http.openai.errors import error_body
from millpond.observe.log import fields

if TYPE_CHECKING:
    from starlette.types import Scope
    from uvicorn.config import Config
    from uvicorn.server import ServerState

log = logging.getLogger("millpond.http")

MOST_UNSENT = 64 * 1024
"""Bytes that the kernel takes before the client reads. It would take megabytes, which hide a slow reader from us."""
UNSENT_OPTION = getattr(socket, "TCP_NOTSENT_LOWAT", 0x201 if sys.platform == "darwin" else None)
LEAST_READ = 32 * 1024
"""A client must take so many bytes, or all there are, of what waits for it in each write time-out."""
PIECE = 2 * 1024
"""Bytes of a request that are parsed at a time, unless they are known to be a body's: chunks may be a byte each."""
NO_HTTP = error_body(ApiError(400, "the request is not valid HTTP", code="bad_http"))


def protocol(most: int, head_seconds: float, write_seconds: float) -> Callable[..., Connection]:
    """Makes uvicorn's connections: at most ``most``, each with ``head_seconds`` for a request's head, and cut when what
    was written stays unread for ``write_seconds`` (0: no limit)."""

    return partial(Connection, most=most, head_seconds=head_seconds, write_seconds=write_seconds)


class Flow(FlowControl):
    """uvicorn's, which may also be held: nothing is read then, whatever anybody else wants."""

    _held = False

    def hold(self) -> None:
        if not self._held:
            self._held = True
            self._transport.pause_reading()

    def release(self) -> None:
        if self._held:
            self._held = False
            if not self.read_paused:
                self._transport.resume_reading()

    def resume_reading(self) -> None:
        if self._held:
            self.read_paused = False
        else:
            super().resume_reading()


class Connection(H11Protocol):
    """uvicorn's, with limits."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        most: int,
        head_seconds: float,
        write_seconds: float,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._most = most
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_seconds = write_seconds
        self._unread_timer: asyncio.TimerHandle | None = None
        self._answering = False
        self._unparsed = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            log.warning("too many connections", extra=fields(most=self._most))
            transport.abort()
            return
        self.flow = self._flow = Flow(transport)
        if UNSENT_OPTION is not None:
            with contextlib.suppress(OSError):  # a kernel without it only notices later that nothing is read
                transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, UNSENT_OPTION, MOST_UNSENT)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unparsed.clear()
        self._head_came()
        self._was_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._unparsed:
            self._unparsed += data
        elif len(data) <= PIECE or (self._answering and not self._chunked):
            self._parse(data)
        else:
            self._unparsed += data
            self._flow.hold()
            self._parse_pieces()

    def _parse_pieces(self) -> None:
        """The next piece now, and the rest of them when others have had their turn."""
        if not self._unparsed or self.transport.is_closing():
            self._unparsed.clear()
            return
        piece = bytes(self._unparsed[:PIECE])
        del self._unparsed[:PIECE]
        self._parse(piece)
        if self._unparsed:
            self.loop.call_soon(self._parse_pieces)
        else:
            self._flow.release()

    def _parse(self, data: bytes) -> None:
        if self._head_timer is None and not self._answering:
            self._await_head()  # of the next request on this connection
        super().data_received(data)

    @property
    def _context(self) -> RequestContext:
        return context_of(cast("Scope", self.scope))

    @property
    def _chunked(self) -> bool:
        return any(name == b"transfer-encoding" for name, _ in self.headers)

    def handle_events(self) -> None:
        before = self.scope
        super().handle_events()
        if self.scope is not before:
            self._context.connections = len(self.connections)
            self._answering = True
            self._head_came()
            if not self.flow.write_paused:
                self._was_read()

    def on_response_complete(self) -> None:
        self._answering = False
        super().on_response_complete()
        self._await_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._was_read()
        if not self._answering:
            self._await_reading()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words are not for clients
        """What is no HTTP at all still gets our error shape."""
        head = (
            f"HTTP/1.1 400 {STATUS_PHRASES[400].decode()}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(NO_HTTP)}\r\nconnection: close\r\n\r\n"
        )
        if not self.transport.is_closing():
            self.transport.write(head.encode() + NO_HTTP)
            self.transport.close()
            self._await_reading()

    def _await_head(self) -> None:
        if self._head_seconds > 0:
            self._head_timer = self.loop.call_later(self._head_seconds, self.transport.abort)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _await_reading(self) -> None:
        """Start the clock for what lies unread. While it runs, nothing is added: what waits can only get less."""
        waiting = self.transport.get_write_buffer_size()
        if self._write_seconds > 0 and self._unread_timer is None and waiting:
            self._unread_timer = self.loop.call_later(self._write_seconds, self._unread, waiting)

    def _was_read(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _unread(self, before: int) -> None:
        self._unread_timer = None
        waiting = self.transport.get_write_buffer_size()
        if waiting > max(0, before - LEAST_READ):
            if self._answering:
                self._context.left = "stalled"
            self.transport.abort()
        else:
            self._await_reading()
