"""What ``millpond doctor --device`` has an engine do, in which order, and for how long.

A budget of time keeps it short on any device: what a measured rate predicts not to fit is left out and said to be, and
what takes longer than predicted is given up when the budget ends. Nothing is extrapolated.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from millpond import wire
from millpond.cli.doctor import results
from millpond.cli.doctor.disk import file_system
from millpond.cli.doctor.results import DONATION, HIT, PARITY, RESTART, START, ResultRow, decode_name, prefill_name
from millpond.cli.doctor.timing import ROW_PROMPT, DecodeWindow, TimedAnswer, TimedRequests
from millpond.client import EngineClient, EngineError, EngineUnavailable
from millpond.client.start import engine_client
from millpond.config import ServeConfig
from millpond.types import ModelInfo, Salt

BUDGET_SECONDS = 120.0
"""From the first engine's readiness to the last row. Loading is the model's size and the disk's speed: it is shown, and
does not count."""
FIRST_PROMPT, FIRST_ANSWER = 130, 8
"""Of what is asked before anything is shown: twice, for the first time may compile what it needs."""
FIRST_SECONDS = 60.0
"""A device that takes longer for these two has no time for anything else."""
PARITY_LENGTHS = (40, 60, 80, 100, 120, 140, 160, 180)
"""Prompts shorter and longer than a block, some of which end in its middle."""
PARITY_ANSWER, LEAST_PARITY_ANSWER = 24, 8
PARITY_SHARE = 0.25
"""Of the budget, what parity may take before its answers are made shorter."""
HITS = (0, -1)
"""Which of these prompts are asked again: the shortest, all of it in one block, and the longest."""
ROWS = (1, 8, 32)
WINDOW = DecodeWindow(seconds=3.0, least_steps=8, most_steps=128)
PREFILLS = (1024, 8192)
LONG_ANSWER = 8
"""Tokens after a long prompt: some, to compare them after the restart."""
GROWTH = 1.5
"""How much longer a token of a prompt may take than one of a shorter prompt, for attention over all before it."""
WARM_SHARE = 0.2
"""Of a prompt's cold TTFT, what it may be expected to take from disk."""
STOP_SECONDS, STOP_PATIENCE = 5.0, 15.0
"""What an orderly stop may take, to write what is not on disk yet, and after what it is none any more."""
TOGETHER, ALONE = Salt("together"), Salt("alone")
"""The same prompts are asked twice, and each time nothing of them must be cached."""


def rows_of_the_table() -> tuple[str, ...]:
    """Their names, in order."""
    return (START, PARITY, HIT, DONATION, *map(decode_name, ROWS), *map(prefill_name, PREFILLS), RESTART)


class SelfTest:
    """One run of it, on engines of its own. Event loop only."""

    def __init__(
        self,
        config: ServeConfig,
        start: wire.Start,
        say: Callable[[str], None],
        budget: float = BUDGET_SECONDS,
        command: Sequence[str] = (),
    ) -> None:
        """``start`` has the SSD tier in a folder of the test's own. ``say`` is told what is going on. ``budget``:
        seconds. ``command``: of the engine, unless it is Millpond's own."""
        self._config = config
        self._start = start
        self._say = say
        self._budget = budget
        self._command = command
        self._rows: list[ResultRow] = []
        self._ends = 0.0
        """When the budget is used up, by the loop's clock."""
        self._start_seconds = 0.0
        self._step = (0.0, 1)
        """Seconds of a decode step, and of how many rows: the most so far."""
        self._rate = 0.0
        """Prompt tokens per second, of the longest prompt so far."""
        self._alone: list[tuple[list[int], TimedAnswer]] = []
        """Prompts that were asked alone, and what was answered."""
        self._longest: tuple[list[int], TimedAnswer] | None = None
        """Of the prompts whose reading was timed."""
        self.info: ModelInfo | None = None
        """Of the engine; None until it is ready."""

    async def run(self) -> list[ResultRow]:
        """All rows of the table, in order."""
        self._say(f"{START} …")
        try:
            async with self._engine() as client:
                await self._measure(client)
        except EngineUnavailable as error:
            self._say(error.whole)
            self._rows.append(results.failed(START, str(error)))
        there = {row.test for row in self._rows}
        self._rows += [
            results.skipped(test, "it did not get that far") for test in rows_of_the_table() if test not in there
        ]
        return self._rows

    @contextlib.asynccontextmanager
    async def _engine(self) -> AsyncIterator[EngineClient]:
        """One that is ready, until the end of the context. Raises EngineUnavailable where none can be had."""
        client = engine_client(self._config, self._start, command=self._command)
        try:
            begun = time.monotonic()
            try:
                await client.start()
            except OSError as error:
                raise EngineUnavailable(client.whole_reason()) from error
            await client.settled()
            self._start_seconds = time.monotonic() - begun
            yield client
        finally:
            await client.stop(0.0)

    async def _measure(self, client: EngineClient) -> None:
        assert client.info is not None
        info = self.info = client.info
        asker = TimedRequests(client)
        self._ends = asyncio.get_running_loop().time() + self._budget
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                await self._first(asker)
        except (EngineError, EngineUnavailable) as error:
            self._rows.append(results.failed(START, f"the first request: {error}"))
            return
        except TimeoutError:
            self._rows.append(results.failed(START, f"{FIRST_PROMPT} tokens were not read in {FIRST_SECONDS:.0f} s"))
            return
        self._rows.append(results.started(info, self._start_seconds))
        await self._compare(asker, info)
        self._rows.append(results.donation(info))
        for rows in ROWS:
            await self._row(decode_name(rows), self._decode_seconds(rows), partial(self._decode, asker, rows))
        for tokens in PREFILLS:
            await self._prefill(asker, info, tokens)
        if not info.prefix_cache:
            self._rows.append(results.skipped(RESTART, "prefixes are not cached"))
        elif self._longest is None:
            self._rows.append(results.skipped(RESTART, "no long prompt was read before"))
        else:
            prompt, cold = self._longest
            seconds = self._restart_seconds(cold.first_seconds)
            await self._row(RESTART, seconds, partial(self._restart, client, prompt, cold))

    async def _row(
        self, test: str, predicted: float, measured: Callable[[], Awaitable[ResultRow]], reserve: float = 0.0
    ) -> None:
        """Add the row that ``measured`` makes, if there is time for it: ``predicted`` seconds, and ``reserve`` left for
        what comes behind."""
        if predicted + reserve > self._ends - asyncio.get_running_loop().time():
            self._rows.append(results.skipped(test, f"about {results.duration(predicted)}"))
            return
        self._say(f"{test} …")
        try:
            async with asyncio.timeout_at(self._ends):
                row = await measured()
        except TimeoutError:
            row = results.skipped(test, f"not done when the {self._budget:.0f} s of the self-test were over")
        except (EngineError, EngineUnavailable) as error:
            row = results.failed(test, str(error))
        self._rows.append(row)

    # --- what is measured ---------------------------------------------------------------------------------------

    async def _first(self, asker: TimedRequests) -> None:
        """Learn roughly how fast the device is."""
        for _ in range(2):
            answer = await asker.ask(asker.prompt(FIRST_PROMPT), FIRST_ANSWER)
        self._step = (answer.step_seconds, 1)
        self._rate = answer.prefill_rate

    async def _compare(self, asker: TimedRequests, info: ModelInfo) -> None:
        """The same prompts all at once, one by one, and some of them again."""
        count, step = len(PARITY_LENGTHS), self._step[0]
        steps = 2 * count + len(HITS)  # at worst, rows together take as long as one by one
        reading = 2 * sum(PARITY_LENGTHS) / self._rate
        fitting = int((self._budget * PARITY_SHARE - reading) / max(step * steps, 1e-9))
        length = max(LEAST_PARITY_ANSWER, min(PARITY_ANSWER, fitting))
        await self._row(PARITY, reading + 2 * count * length * step, partial(self._parity, asker, info, length))
        if not info.prefix_cache:
            self._rows.append(results.skipped(HIT, f"prefixes are not cached: {info.prefix_cache_reason}"))
        elif not self._alone:
            self._rows.append(results.skipped(HIT, "nothing was asked before"))
        else:
            await self._row(HIT, len(HITS) * length * step, partial(self._hit, asker, length))

    async def _parity(self, asker: TimedRequests, info: ModelInfo, length: int) -> ResultRow:
        prompts = [asker.prompt(tokens) for tokens in PARITY_LENGTHS]
        together = await asker.together(prompts, length, TOGETHER)
        alone = [await asker.ask(prompt, length, ALONE) for prompt in prompts]
        self._alone = list(zip(prompts, alone, strict=True))
        return results.parity(info, together, alone)

    async def _hit(self, asker: TimedRequests, length: int) -> ResultRow:
        asked = [self._alone[number] for number in HITS]
        again = [await asker.ask(prompt, length, ALONE) for prompt, _ in asked]
        return results.hit([miss for _, miss in asked], again)

    def _decode_seconds(self, rows: int) -> float:
        """Predicted, as if a step of so many rows took as many times as long as one of fewer."""
        seconds, stepped = self._step
        steps = WINDOW.least_steps * seconds * max(1.0, rows / stepped)
        return rows * ROW_PROMPT / self._rate + max(steps, WINDOW.seconds)

    async def _decode(self, asker: TimedRequests, rows: int) -> ResultRow:
        rate = await asker.decode(rows, WINDOW)
        if rate is not None:
            self._step = (rate.step_seconds, rows)
        return results.decoded(rows, rate)

    async def _prefill(self, asker: TimedRequests, info: ModelInfo, wanted: int) -> None:
        """Read a prompt of as many tokens as are wanted, or as there is room for."""
        test = prefill_name(wanted)
        measured = self._longest[1].prompt_tokens if self._longest is not None else 0
        tokens = min(wanted, _room(info) - LONG_ANSWER)
        if tokens <= measured:
            self._rows.append(results.skipped(test, f"there is no room for more than {measured} tokens"))
            return
        seconds = tokens / self._rate * (GROWTH if measured else 1.0)
        reserve = self._restart_seconds(seconds) if measured else 0.0
        await self._row(test, seconds, partial(self._read, asker, test, tokens), reserve)

    async def _read(self, asker: TimedRequests, test: str, tokens: int) -> ResultRow:
        prompt = asker.prompt(tokens)
        answer = await asker.ask(prompt, LONG_ANSWER)
        self._longest = (prompt, answer)
        self._rate = answer.prefill_rate
        return results.prefilled(test, answer)

    def _restart_seconds(self, cold: float) -> float:
        """Predicted, for a prompt whose TTFT is ``cold`` seconds where nothing of it is cached."""
        return STOP_SECONDS + self._start_seconds + WARM_SHARE * cold

    async def _restart(self, client: EngineClient, prompt: list[int], cold: TimedAnswer) -> ResultRow:
        await client.stop(STOP_PATIENCE)
        async with self._engine() as other:
            warm = await TimedRequests(other).ask(prompt, LONG_ANSWER)
        return results.restarted(cold, warm, file_system(Path(self._start.prefix.cache_dir).resolve()))


def _room(info: ModelInfo) -> int:
    """Tokens that a prompt may have, with its answer: arrays grow by more than they need, and blocks of the prompt are
    kept beside them."""
    each = info.kv_bytes_per_token
    return min(info.context_length, info.kv_limit_bytes // each // 2) if each else info.context_length
