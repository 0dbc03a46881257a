"""All answers of one HTTP request: submitted together, read as one sequence of pieces, given up together.

Detokenising and stop strings happen here, on the event loop: they cost microseconds per token.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from kvarn.client import EngineClient, EngineError, EngineUnavailable, Stream
from kvarn.http.errors import unavailable
from kvarn.text.answer import Answer
from kvarn.text.tokenizer import Tokenizer
from kvarn.types import Delta, ErrorKind, Finish, PrefixReport, Request, TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What one engine step added to one choice. ``text`` may be empty; ``finish`` is stop, length, or not yet."""

    choice: int
    text: str
    logprobs: list[TokenLogprob]
    finish: str | None


@dataclass(slots=True)
class _Choice:
    """The text side of one request."""

    index: int
    request: Request
    answer: Answer
    prefix: PrefixReport = field(default_factory=PrefixReport)
    pending: deque[TokenLogprob] = field(default_factory=deque)
    """Log-probabilities of tokens whose text is still held back, perhaps to be cut by a stop string."""

    def take(self, delta: Delta) -> Piece:
        self.prefix = delta.prefix or self.prefix
        self.pending.extend(delta.logprobs or ())
        part = self.answer.add(delta.tokens)
        text, settled, stopped = part.text, part.tokens, part.stopped
        if delta.finish is not None and not stopped:
            rest = self.answer.finish()
            text, settled, stopped = text + rest.text, settled + rest.tokens, rest.stopped
        finish = Finish.STOP if stopped else delta.finish
        logprobs = [self.pending.popleft() for _ in range(min(settled, len(self.pending)))]
        return Piece(self.index, text, logprobs, finish.value if finish is not None else None)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one HTTP request; a prompt counts once however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def payload(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """Iterate inside ``async with``: every way out cancels what still runs.

    ``requests`` holds ``n`` of them per prompt, next to each other. Iteration raises EngineError as soon as any choice
    fails.
    """

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, requests: Sequence[Request], stops: Sequence[str], n: int
    ) -> None:
        self._client = client
        self._n = n
        self._choices = [
            _Choice(index, request, Answer(tokenizer.detokenizer(), stops)) for index, request in enumerate(requests)
        ]
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._streams: list[Stream] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._running = len(self._choices)
        self._start = time.monotonic()
        self.first_seconds: float | None = None
        """From submission to the first token of any choice."""

    async def __aenter__(self) -> Self:
        try:
            for choice in self._choices:
                self._streams.append(self._client.submit(choice.request))
        except EngineUnavailable as error:
            self._give_up()
            raise unavailable(str(error)) from error
        self._pumps = [
            asyncio.create_task(self._pump(choice, stream))
            for choice, stream in zip(self._choices, self._streams, strict=True)
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_up()

    def _give_up(self) -> None:
        for stream in self._streams:
            stream.cancel()
        for pump in self._pumps:
            pump.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        if not self._running:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        if self.first_seconds is None:
            self.first_seconds = time.monotonic() - self._start
        if item.finish is not None:
            self._running -= 1
        return item

    async def _pump(self, choice: _Choice, stream: Stream) -> None:
        try:
            async with stream:
                async for delta in stream:
                    piece = choice.take(delta)
                    self._queue.put_nowait(piece)
                    if piece.finish is not None:
                        return
            self._queue.put_nowait(EngineError(ErrorKind.UNAVAILABLE, "this request was cancelled"))
        except Exception as error:  # noqa: BLE001 - the reader waits on the queue: it gets it, and raises it there
            self._queue.put_nowait(error)

    def usage(self) -> Usage:
        """Counts so far; exact once iteration has ended."""
        firsts = self._choices[:: self._n]
        return Usage(
            sum(len(choice.request.tokens) for choice in firsts),
            sum(choice.answer.completion_tokens for choice in self._choices),
            sum(choice.prefix.cached for choice in firsts),
        )

    def prefix(self) -> PrefixReport:
        """What the prefix cache did so far: tokens of all prompts, and why the first one's cached prefix ended."""
        reports = [choice.prefix for choice in self._choices[:: self._n]]
        return PrefixReport(
            sum(report.memory for report in reports),
            sum(report.disk for report in reports),
            reports[0].end,
            sum(report.known for report in reports),
        )
