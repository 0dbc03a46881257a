"""One request's answer as an async iterator.

A stream ends exactly once: with the delta that carries a finish, with an error, or by being cancelled. Whoever waits on
it is released at that moment. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

from millpond.client.public import public
from millpond.types import Delta, ErrorKind, Finish


class EngineError(Exception):
    """A request ended without its answer; ``kind`` says why, the message is for the client, and freed of paths."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        self.kind = kind
        self.message = public(message)
        super().__init__(self.message)


class EngineUnavailable(Exception):  # noqa: N818 - it names a state, not a mistake
    """The engine takes no requests now: starting, restarting, stopped or failed; the message, freed of paths, says
    which, and ``whole`` all of it to whoever runs the server."""

    def __init__(self, whole: str) -> None:
        super().__init__(public(whole))
        self.whole = whole


class Stream:
    """Deltas of one request in order. Iterate it inside ``async with``: leaving early cancels the request, leaving with
    an EngineError fails it.

    Iteration stops after the delta with a finish, or without one if ``cancel`` was called, and raises EngineError when
    the request failed. Made by EngineClient.submit.
    """

    def __init__(self, request_id: str, leave: Callable[[str, Finish | EngineError], None]) -> None:
        """``leave`` is told the id and why its reader gives the request up."""
        self.id = request_id
        self._leave = leave
        self._items: deque[Delta] = deque()
        self._error: EngineError | None = None
        self._ended = False
        self._changed = asyncio.Event()

    def push(self, delta: Delta) -> None:
        """Add what the engine produced. Called by EngineClient only."""
        self._items.append(delta)
        self._changed.set()

    def end(self, error: EngineError | None = None) -> None:
        """Mark the end and release the waiter. Called by EngineClient only, once."""
        self._ended = True
        self._error = error
        self._changed.set()

    def cancel(self) -> None:
        """Give the request up; unread deltas are dropped. Harmless when repeated or when it has ended."""
        self._give_up(Finish.CANCELLED)

    def complete(self) -> None:
        """The reader has all that it wants, before the engine's own end: the request counts as finished."""
        self._give_up(Finish.STOP)

    def _give_up(self, why: Finish | EngineError) -> None:
        self._items.clear()
        self._leave(self.id, why)

    async def __anext__(self) -> Delta:
        while not self._items:
            if self._ended:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._items.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_up(error if isinstance(error, EngineError) else Finish.CANCELLED)
