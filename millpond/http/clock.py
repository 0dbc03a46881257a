"""How long one answer may wait, be read and be drawn.

Event loop only; seconds of the event loop's clock, which no change of the machine's time moves.
"""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import NamedTuple

from millpond.client import EngineError, Stream
from millpond.config import ServeConfig
from millpond.types import Delta, ErrorKind


class Phase(Enum):
    """What an answer waits for."""

    QUEUE = "its prompt to be begun"
    PREFILL = "its first token"
    DECODE = "its next token"


class Spent(NamedTuple):
    """The phase that has just ended, and how long it took."""

    phase: Phase
    seconds: float


OVERSLEPT = 1.0
"""A timer that fires so many seconds late tells that nothing could run before."""

_KINDS = {
    Phase.QUEUE: ErrorKind.QUEUE_TIMEOUT,
    Phase.PREFILL: ErrorKind.FIRST_TOKEN_TIMEOUT,
    Phase.DECODE: ErrorKind.TOKEN_TIMEOUT,
}


class Clock:
    """One answer's phases and their deadlines."""

    def __init__(self, config: ServeConfig, start: float) -> None:
        self._limits = {
            Phase.QUEUE: config.queue_timeout,
            Phase.PREFILL: config.first_token_timeout,
            Phase.DECODE: config.token_timeout,
        }
        self._total = config.request_timeout
        self.start = start
        self._phase = Phase.QUEUE
        self.now = start
        """When the current phase began."""

    @property
    def deadline(self) -> float | None:
        """When the answer is late; None: never."""
        limit = self._limits[self._phase]
        ends = [self.now + limit] if limit else []
        return min([*ends, *([self.start + self._total] if self._total else [])], default=None)

    async def next(self, stream: Stream) -> Delta:
        """What comes next from the engine, within the deadline. Raises EngineError."""
        while True:
            try:
                async with asyncio.timeout_at(self.deadline):
                    delta = await anext(stream, None)
            except TimeoutError:
                if self.overslept():
                    continue
                raise self.late() from None
            if delta is None:
                raise EngineError(ErrorKind.UNAVAILABLE, "this request was cancelled")
            return delta

    def overslept(self) -> bool:
        """Whether the deadline passed while this process stood still (stopped, or the machine asleep): what came
        meanwhile is still unread, so the phase begins anew. Never for the whole request's deadline."""
        now, deadline = asyncio.get_running_loop().time(), self.deadline
        if deadline is None or now - deadline < OVERSLEPT:
            return False
        self.now = now
        return self.deadline is None or self.deadline > now

    def late(self) -> EngineError:
        """What to say when the deadline has passed."""
        limit = self._limits[self._phase]
        if self._total and (not limit or self.start + self._total <= self.now + limit):
            said = f"the request was not finished within {self._total:g} s"
            return EngineError(ErrorKind.REQUEST_TIMEOUT, f"request_timeout: {said}")
        kind = _KINDS[self._phase]
        return EngineError(kind, f"{kind.value}: the request waited {limit:g} s for {self._phase.value}")

    def turn(self, tokens: bool) -> Spent:
        """Something came from the engine: with ``tokens`` (or an end), or only the news that the prompt is begun."""
        before, now = self.now, asyncio.get_running_loop().time()
        spent = Spent(self._phase, now - before)
        self._phase = Phase.DECODE if tokens else Phase.PREFILL
        self.now = now
        return spent
