"""Requests put straight to an engine, without HTTP and tokenizer, and how long it took to answer them.

Prompts are tokens by chance; answers are greedy, not guessed ahead, and end at their length only.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from millpond.client import EngineClient, EngineError, Stream
from millpond.types import ErrorKind, PrefixReport, Request, Salt, SamplingParams, Speculation

EVERYBODY = Salt("")
SEED = 0
"""Of the prompts: two runs, on whatever machines, ask the same of one model."""
Arrivals = asyncio.Queue[tuple[int, float] | Exception | None]
"""A row and when, in seconds, a token of it came; None when a row has ended; or what went wrong."""
ROW_PROMPT = 32
"""Tokens of the prompt of each row whose decoding is timed: short, so that all rows are soon under way."""


@dataclass(frozen=True)
class TimedAnswer:
    """One answer. Seconds count from when it was asked for."""

    prompt_tokens: int
    tokens: tuple[int, ...]
    first_seconds: float
    """Until its first token was here (TTFT)."""
    seconds: float
    """Until its last one was."""
    prefix: PrefixReport
    """What of the prompt came from the prefix cache."""

    @property
    def step_seconds(self) -> float:
        """From one token to the next."""
        return (self.seconds - self.first_seconds) / max(1, len(self.tokens) - 1)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second until the first token."""
        return self.prompt_tokens / max(self.first_seconds, 1e-9)


@dataclass(frozen=True)
class DecodeRate:
    """How fast rows decode that all run at once, once all their prompts have been read."""

    rows: int
    tokens_per_second: float
    """Of all rows together."""

    @property
    def step_seconds(self) -> float:
        """From one token of a row to its next."""
        return self.rows / self.tokens_per_second


@dataclass(frozen=True)
class DecodeWindow:
    """For how long decoding is timed: ``seconds``, but at least and at most so many steps."""

    seconds: float
    least_steps: int
    most_steps: int

    def over(self, steps: float, seconds: float) -> bool:
        """Whether so much is enough."""
        return steps >= self.most_steps or (steps >= self.least_steps and seconds >= self.seconds)


class TimedRequests:
    """Asks one engine, which has to be ready. Event loop only."""

    def __init__(self, client: EngineClient) -> None:
        assert client.info is not None
        self._client = client
        self._numbers = itertools.count()
        self._chooser = random.Random(SEED)  # noqa: S311 - any tokens do
        # Control tokens are the first or the last ids of a vocabulary, if not beyond those of the text.
        size = client.info.vocab_size
        self._ids = range(size // 10, size // 2)

    def prompt(self, length: int) -> list[int]:
        """So many tokens by chance: another prompt each time, the same ones in each run."""
        return self._chooser.choices(self._ids, k=length)

    def _submit(self, prompt: list[int], most: int, salt: Salt) -> Stream:
        params = SamplingParams(max_tokens=most, temperature=0.0)
        name = f"doctor-{next(self._numbers)}"
        return self._client.submit(
            Request(id=name, tokens=prompt, params=params, cache_salt=salt, speculation=Speculation())
        )

    async def ask(self, prompt: list[int], most: int, salt: Salt = EVERYBODY) -> TimedAnswer:
        """The answer, of ``most`` tokens. Raises EngineError, EngineUnavailable."""
        begun = time.monotonic()
        tokens: list[int] = []
        times: list[float] = []
        prefix = PrefixReport()
        async with self._submit(prompt, most, salt) as stream:
            async for delta in stream:
                prefix = delta.prefix or prefix
                if delta.tokens:
                    tokens += delta.tokens
                    times.append(time.monotonic() - begun)
        if len(tokens) != most:
            raise EngineError(ErrorKind.ENGINE, f"an answer of {most} tokens ended after {len(tokens)}")
        return TimedAnswer(len(prompt), tuple(tokens), times[0], times[-1], prefix)

    async def together(self, prompts: Sequence[list[int]], most: int, salt: Salt = EVERYBODY) -> list[TimedAnswer]:
        """The answers to prompts that are asked all at once. Raises EngineError, EngineUnavailable."""
        asked = [self.ask(prompt, most, salt) for prompt in prompts]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, TimedAnswer)]

    async def decode(self, rows: int, window: DecodeWindow) -> DecodeRate | None:
        """Time so many rows while all of them decode; None when they never do. Raises EngineError,
        EngineUnavailable."""
        # While the last prompts are read, the first rows decode: at least one prompt is read in each step.
        most = rows + window.most_steps
        came: Arrivals = asyncio.Queue()
        readers = [asyncio.create_task(self._read(row, self.prompt(ROW_PROMPT), most, came)) for row in range(rows)]
        try:
            return await rate_of_all(rows, window, came)
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    async def _read(self, row: int, prompt: list[int], most: int, came: Arrivals) -> None:
        """Tell of each token of a row."""
        try:
            async with self._submit(prompt, most, EVERYBODY) as stream:
                async for delta in stream:
                    for _ in delta.tokens:
                        came.put_nowait((row, time.monotonic()))
            came.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - who waits on the queue gets it, and raises it there
            came.put_nowait(error)


async def rate_of_all(rows: int, window: DecodeWindow, came: Arrivals) -> DecodeRate | None:
    """Of tokens that come once every row has its first; None when a row ends before that. Raises what went wrong."""
    waiting = set(range(rows))
    times: list[list[float]] = [[] for _ in range(rows)]
    counted, begun = 0, 0.0
    while True:
        item = await came.get()
        if isinstance(item, Exception):
            raise item
        if item is None:
            return None if waiting else rate_of(times)
        row, when = item
        waiting.discard(row)
        if waiting:
            continue
        begun = begun or when
        times[row].append(when)
        counted += 1
        if window.over(counted / rows, when - begun):
            return rate_of(times)


def rate_of(times: Sequence[Sequence[float]]) -> DecodeRate | None:
    """Of when the tokens of each row came, in seconds; each row is timed by its own tokens, so that it does not matter
    in whose step the count began and ended. None where nothing can be said of any row."""
    spans = [(len(row) - 1, row[-1] - row[0]) for row in times if len(row) > 1]
    rate = sum(count / seconds for count, seconds in spans if seconds > 0)
    return DecodeRate(len(times), rate) if rate else None
