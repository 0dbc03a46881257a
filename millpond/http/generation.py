"""All answers of one HTTP request: submitted together, read as one sequence of events, given up together.

Detokenising and stop strings happen here, on the event loop: they cost microseconds per token. So do the time-outs, on
what comes from the engine: a client that reads slowly is not the engine's delay.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from millpond.client import EngineError, EngineUnavailable, Stream
from millpond.config import ServeConfig
from millpond.http.clock import Clock, Phase
from millpond.http.errors import unavailable
from millpond.http.events import Begun, ChoiceDelta, Event, Usage
from millpond.http.places import Places
from millpond.http.served_model import ServedModel
from millpond.http.spellings import Listener
from millpond.text.answer import AnswerText
from millpond.text.tokenizer import TextError
from millpond.types import Delta, ErrorKind, Finish, PrefixReport, Request, TokenLogprob, Verdict


@dataclass(slots=True)
class _Choice:
    """The text side of one request."""

    index: int
    prompt_tokens: int
    answer: AnswerText
    listener: Listener
    first_token: int | None
    """Of its prompt, where the log-probabilities of that are asked."""
    prefix: PrefixReport | None = None
    """What the prefix cache did for it, once its prompt has been begun."""
    pending: deque[TokenLogprob] = field(default_factory=deque)
    """Log-probabilities of tokens whose text is still held back, perhaps to be cut by a stop string."""
    begun: float = 0.0
    """When its prompt was begun, by the loop's clock."""
    first: float = 0.0
    """When its first token came."""
    ended: bool = False
    """All of it is there."""
    rejected: int = 0
    """Tokens guessed ahead that were not drawn."""
    _accepted: int = 0
    """Tokens guessed ahead that surely belong to the answer."""
    _spans: deque[tuple[int, int]] = field(default_factory=deque)
    """From where to where further tokens were guessed ahead: a stop string may yet cut the answer before their end."""
    _settled: int = 0
    """Tokens that surely belong to the answer."""

    def take(self, delta: Delta) -> ChoiceDelta:
        self.pending.extend(delta.logprobs or ())
        if delta.verdict is not None:
            self._judged(delta.verdict)
        part = self.answer.add(delta.tokens)
        pieces, settled, stopped = part.pieces, part.tokens, part.stopped
        if delta.finish is not None and not stopped:
            rest = self.answer.finish()
            pieces, settled, stopped = pieces + rest.pieces, settled + rest.tokens, rest.stopped
        self._settle(settled)
        self.listener.hear(pieces)
        finish = Finish.STOP if stopped else delta.finish
        logprobs = [self.pending.popleft() for _ in range(min(settled, len(self.pending)))]
        return ChoiceDelta(self.index, pieces, logprobs, finish, self.answer.stopped_by if stopped else "")

    def score(self, delta: Delta) -> ChoiceDelta | None:
        """What a delta tells of the prompt, behind its first token, of which the model thinks nothing."""
        scored = list(delta.prompt_logprobs or ())
        if self.first_token is not None and (scored or delta.tokens or delta.finish is not None):
            scored.insert(0, TokenLogprob(self.first_token, math.nan, []))
            self.first_token = None
        return ChoiceDelta(self.index, (), [], None, scored=scored) if scored else None

    def _judged(self, verdict: Verdict) -> None:
        """Note which of the next tokens were guessed."""
        begin = self.answer.completion_tokens
        self.rejected += verdict.rejected
        if verdict.accepted:
            self._spans.append((begin, begin + verdict.accepted))

    def _settle(self, tokens: int) -> None:
        """So many more tokens surely belong to the answer."""
        self._settled += tokens
        while self._spans and self._spans[0][1] <= self._settled:
            begin, end = self._spans.popleft()
            self._accepted += end - begin

    @property
    def cached_tokens(self) -> int:
        """Of its prompt."""
        return 0 if self.prefix is None else self.prefix.cached

    @property
    def accepted(self) -> int:
        """Tokens of the answer that had been guessed ahead: neither what a stop string cut nor the end itself."""
        count = self.answer.completion_tokens
        return self._accepted + sum(max(0, min(end, count) - begin) for begin, end in self._spans)


def _first_scored(request: Request) -> int | None:
    return request.tokens[0] if request.params.prompt_logprobs is not None else None


class Generation:
    """Iterate inside ``async with``: every way out cancels what still runs.

    ``start`` is when the HTTP request was let in, by the loop's clock: waiting counts from there. ``requests`` holds
    ``n`` of them per prompt, next to each other, and ``answers`` the text side of each. Iteration raises EngineError as
    soon as any choice fails.
    """

    def __init__(
        self,
        model: ServedModel,
        config: ServeConfig,
        requests: Sequence[Request],
        answers: Sequence[AnswerText],
        n: int,
        start: float,
        places: Places,
    ) -> None:
        """``places``: of the first prompt."""
        self._client = model.client
        self._config = config
        self._meters = model.meters
        self._n = n
        for request in requests[::n]:
            self._meters.asked(n, request.params.max_tokens)
        self._choices = [
            _Choice(
                index,
                len(request.tokens),
                answer,
                Listener(model.spellings, request.cache_salt),
                _first_scored(request),
            )
            for index, (request, answer) in enumerate(zip(requests, answers, strict=True))
        ]
        self._requests = deque(requests)
        self._queue: asyncio.Queue[Begun | ChoiceDelta | Exception] = asyncio.Queue()
        self._streams: list[Stream] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._running = len(self._choices)
        self._hungry = True
        """The reader waits for an event, or has yet to begin: it has not been given the time to take what is queued."""
        self._start = start
        self._places = places
        self.first_seconds: float | None = None
        """From ``start`` to the first token of any choice."""

    async def __aenter__(self) -> Self:
        try:
            while self._requests:  # the engine has them then; here they would only lie
                self._streams.append(self._client.submit(self._requests.popleft()))
                if self._requests:
                    await asyncio.sleep(0)  # each may be a long prompt
        except EngineUnavailable as error:
            self._give_up()
            raise unavailable(str(error)) from error
        except asyncio.CancelledError:
            self._give_up()
            raise
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

    async def events(self, patience: float = 0.0) -> AsyncIterator[Event | None]:
        """What comes, in order, at last the usage; None whenever nothing to show has come for ``patience`` seconds (0:
        never)."""
        now = asyncio.get_running_loop().time
        shown = now()
        while self._running:
            item = await self._next(shown + patience if patience else None)
            if isinstance(item, Exception):
                raise item
            delta = item if isinstance(item, ChoiceDelta) else None
            if delta is not None and delta.finish is not None:
                self._running -= 1
            yield item
            if patience and (delta is None or not delta.silent):
                shown = now()
        yield self.usage()

    async def _next(self, deadline: float | None) -> Begun | ChoiceDelta | Exception | None:
        self._hungry = True
        try:
            async with asyncio.timeout_at(deadline):
                return await self._queue.get()
        except TimeoutError:
            return None
        finally:
            self._hungry = False

    async def _pump(self, choice: _Choice, stream: Stream) -> None:
        """Read one choice's deltas into the queue, within the time-outs, until it ends."""
        try:
            async with stream:
                await self._read(choice, stream)
        except TextError as error:
            self._queue.put_nowait(EngineError(ErrorKind.ENGINE, str(error)))
        except Exception as error:  # noqa: BLE001 - the reader waits on the queue: it gets it, and raises it there
            self._queue.put_nowait(error)

    async def _read(self, choice: _Choice, stream: Stream) -> None:
        clock = Clock(self._config, self._start)
        while True:
            delta = await clock.next(stream)
            if delta.prefix is not None:
                first, choice.prefix = choice.prefix is None, delta.prefix
                if first:
                    self._queue.put_nowait(Begun(choice.index, choice.prompt_tokens, delta.prefix.cached))
            self._clocked(choice, clock, delta)
            if scored := choice.score(delta):
                self._queue.put_nowait(scored)
            if not delta.tokens and delta.finish is None:
                continue
            if self._queue.qsize() >= self._config.stream_buffer and not self._hungry:
                most = self._config.stream_buffer
                raise EngineError(ErrorKind.OVERRUN, f"the answer was read too slowly: {most} steps of it were waiting")
            taken = choice.take(delta)
            self._queue.put_nowait(taken)
            if taken.finish is not None:
                if delta.finish is None:  # a stop string: the engine would go on
                    stream.complete()
                self._ended(choice, clock.now)
                return

    def _clocked(self, choice: _Choice, clock: Clock, delta: Delta) -> None:
        """Take the times and counts that a delta tells."""
        tokens = bool(delta.tokens) or delta.finish is not None
        since = clock.turn(tokens)
        if since.phase is Phase.QUEUE:
            self._meters.queued(since.seconds)
            choice.begun = clock.now
        if tokens:
            if since.phase is Phase.DECODE:
                self._meters.token_gap(since.seconds)
            else:
                self._came_first(choice, clock.now)
            self._meters.generated(len(delta.tokens))

    def _came_first(self, choice: _Choice, now: float) -> None:
        """A choice's first token is there."""
        choice.first = now
        first = now - self._start
        self._meters.first_token(first, now - choice.begun, choice.prompt_tokens, choice.cached_tokens)
        self.first_seconds = first if self.first_seconds is None else self.first_seconds

    def _ended(self, choice: _Choice, now: float) -> None:
        """A choice has its whole answer."""
        choice.ended = True
        self._meters.finished(
            choice.prompt_tokens,
            choice.answer.completion_tokens,
            now - self._start,
            now - choice.begun,
            now - choice.first,
        )
        before = choice.index // self._n * self._n
        answers = self._choices[before : before + self._n]
        if all(answer.ended for answer in answers):
            self._meters.all_finished(max(each.answer.completion_tokens for each in answers))

    @property
    def begun(self) -> bool:
        """Whether the engine has begun any prompt: before that, the prefix cache has not been asked."""
        return any(choice.begun for choice in self._choices)

    def usage(self) -> Usage:
        """Counts so far; exact once iteration has ended."""
        firsts = self._choices[:: self._n]
        return Usage(
            sum(choice.prompt_tokens for choice in firsts),
            sum(choice.answer.completion_tokens for choice in self._choices),
            sum(choice.cached_tokens for choice in firsts),
            sum(choice.accepted for choice in self._choices),
            sum(choice.rejected for choice in self._choices),
            sum(choice.answer.thought_tokens for choice in self._choices),
        )

    def prefix(self) -> PrefixReport:
        """What the prefix cache did so far: tokens of all prompts, and why the first one's cached prefix ended."""
        reports = [choice.prefix or PrefixReport() for choice in self._choices[:: self._n]]
        return PrefixReport(
            sum(report.memory for report in reports),
            sum(report.disk for report in reports),
            reports[0].end,
            sum(report.known for report in reports),
        )

    def differs(self) -> str:
        """The part of the request with which the first prompt leaves all that is known; empty where none does."""
        report = self._choices[0].prefix
        return self._places.at(report.known) if report is not None and report.differs else ""
