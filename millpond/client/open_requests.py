"""What has been asked of the engine and is not answered yet, and how everything before ended.

Every request leaves the table in ``_finish`` only, so submitted = finished + failed + cancelled + open at all times.
Event loop only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from millpond.client.stream import EngineError, Stream
from millpond.types import Delta, ErrorKind, Finish, PrefixReport


class Counts:
    """How requests ended since the start; ``submitted`` is the sum of the others plus the open ones."""

    def __init__(self) -> None:
        self.submitted = 0
        self.by_finish: Counter[Finish] = Counter()
        self.by_error: Counter[ErrorKind] = Counter()
        self.cancelled = 0
        self.restarts = 0

    @property
    def finished(self) -> int:
        return self.by_finish.total()

    @property
    def failed(self) -> int:
        return self.by_error.total()


class OpenRequests:
    """Streams by request, and explanations that somebody waits for."""

    def __init__(self, cancel: Callable[[str], None]) -> None:
        """``cancel`` tells the engine that nobody reads a request any more."""
        self.counts = Counts()
        self._cancel = cancel
        self._streams: dict[str, Stream] = {}
        self._explaining: dict[str, asyncio.Future[PrefixReport]] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def add(self, request_id: str) -> Stream:
        """The engine has been asked."""
        stream = self._streams[request_id] = Stream(request_id, self._leave)
        self.counts.submitted += 1
        return stream

    async def explanation(self, name: str) -> PrefixReport:
        """What the engine answers to an Explain. Raises EngineError."""
        answer: asyncio.Future[PrefixReport] = asyncio.get_running_loop().create_future()
        self._explaining[name] = answer
        try:
            return await answer
        finally:
            del self._explaining[name]

    def deliver(self, delta: Delta) -> None:
        """The engine has made a step with a request."""
        stream = self._streams.get(delta.id)
        if stream is None:
            return
        if delta.finish is Finish.CANCELLED:
            # Nobody here asked for it, or the stream would be gone: the engine dropped the request on its own.
            self._finish(delta.id, EngineError(ErrorKind.UNAVAILABLE, "the engine dropped this request"))
            return
        stream.push(delta)
        if delta.finish is not None:
            self._finish(delta.id, delta.finish)

    def explained(self, name: str, how: PrefixReport | EngineError) -> None:
        """The engine has answered an Explain; nobody may be waiting any more."""
        answer = self._explaining.get(name)
        if answer is None or answer.done():
            return
        if isinstance(how, EngineError):
            answer.set_exception(how)
        else:
            answer.set_result(how)

    def fail(self, name: str, error: EngineError) -> None:
        """The engine cannot answer a request or an Explain."""
        self._finish(name, error)
        self.explained(name, error)

    def fail_all(self, error: EngineError) -> None:
        """Nothing of what is open will be answered."""
        for name in [*self._streams, *self._explaining]:
            self.fail(name, error)

    def drop_all(self, error: EngineError) -> None:
        """The same, when the engine has to be told to drop them."""
        for request_id in self._streams:
            self._cancel(request_id)
        self.fail_all(error)

    def _leave(self, request_id: str, why: Finish | EngineError) -> None:
        """Nobody reads this request any more."""
        if request_id in self._streams:
            self._cancel(request_id)
            self._finish(request_id, why)

    def _finish(self, request_id: str, how: Finish | EngineError) -> None:
        """The one place where a request ends."""
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return
        if isinstance(how, EngineError):
            self.counts.by_error[how.kind] += 1
            stream.end(how)
            return
        if how is Finish.CANCELLED:
            self.counts.cancelled += 1
        else:
            self.counts.by_finish[how] += 1
        stream.end()
