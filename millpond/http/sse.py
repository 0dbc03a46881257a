"""Responses that watch their client: an answer in one piece or as server-sent events.

A response here is a coroutine that writes to the connection while another task listens for the client's leaving; when
that happens the work is cancelled at once. Nothing is buffered: every event is one write. The headers go out with the
first event, so whatever fails before it still gets a real status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from millpond.http.context import context_of

Headers = list[tuple[bytes, bytes]]

HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
COMMENT = b": working\n\n"
"""What clients ignore: the connection is in use."""
LARGE = 16 * 1024
"""Bytes of an event after which others get their turn."""
WRITTEN = 256 * 1024
"""Bytes of a whole response that are written at a time."""


class WatchedResponse(Response):
    """Runs ``work(send)`` until it is done or the client is gone; then the work is cancelled.

    A client that reads nothing is gone as well, after a while: see connection.py.
    """

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                context = context_of(scope)
                context.left = context.left or "gone"
        finally:
            for task in (work, watch):
                task.cancel()
            # Gathered, so that permits and engine requests are given back before the connection is let go.
            await asyncio.gather(work, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream:
    """Writes what is ready to be sent; the headers go out with the first of it."""

    def __init__(self, send: Send, headers: Callable[[], Headers] = list) -> None:
        """``headers`` is asked for more of them when the first write goes out."""
        self._send = send
        self._headers = headers
        self.started = False

    async def write(self, data: bytes) -> None:
        """Write now."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS + self._headers()})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        if len(data) > LARGE:
            await asyncio.sleep(0)  # many like it may be ready to be written

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_parts(send: Send, body: list[bytes], more: Headers | None = None) -> None:
    """A whole 200 response of JSON in parts, which are taken away as they are sent: no faster than they are read."""
    size = sum(map(len, body))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(size).encode()), *(more or [])]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    body.reverse()
    while body:
        part = body.pop()
        for start in range(0, len(part), WRITTEN):
            await send({"type": "http.response.body", "body": part[start : start + WRITTEN], "more_body": True})
            await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
