"""Cuts prompts into the chunks of one step, within its token and time budgets. Pure, engine thread.

Chunks end on the grid except the tail of a prompt, which is a chunk of its own: a prompt whose beginning comes from a
prefix cache then has the same last chunks as one computed afresh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from msgspec.structs import replace

from millpond.memory.budget import MemoryBudget
from millpond.schedule.costs import CostModel
from millpond.schedule.request import SchedulerRequest
from millpond.types import PrefillChunk

SIDE_BY_SIDE = 4
"""Times the most tokens of a step: positions of all prompts in one forward, whose keys and values are copied side by
side for attention. The end of a long conversation is read alone."""


@dataclass
class Read:
    """One forward: chunks of different prompts, filled up to the longest of them."""

    chunks: list[PrefillChunk]
    start: int
    """Most tokens that any of its prompts had before."""
    longest: int
    open: bool
    """Others may join."""


class Packer:
    """Collects the ``chunks`` of one step; ``full`` once the next piece in line no longer fits.

    The first piece always fits, at least one grid block or tail of it: slow decoding never stops prefill for good.
    """

    def __init__(
        self,
        costs: CostModel,
        budget: MemoryBudget,
        *,
        max_itl_ms: float,
        max_chunk: int,
        grid: int,
        lengths: list[int],
        slowdown: float = 1.0,
        together: bool = False,
        steady: int = 0,
    ) -> None:
        """``budget`` says how long a chunk may be where. ``lengths``: tokens held by each decoding row. ``max_chunk``:
        most prompt tokens in the step. ``slowdown``: how many times as long as a plain one its decode forward takes.
        ``together``: several prompts may be read in one forward. ``steady``: chunks have so many tokens, see Limits."""
        self.full = False
        self._reads: list[Read] = []
        self._costs = costs
        self._budget = budget
        self._max_itl_ms = max_itl_ms
        self._grid = grid
        self._tokens_left = max_chunk // grid * grid
        self._most_positions = SIDE_BY_SIDE * max_chunk
        self._rows = len(lengths)
        self._context = sum(lengths)
        self._slowdown = slowdown
        self._together = together and not steady
        self._steady = steady
        self._spent_ms = 0.0

    @property
    def chunks(self) -> tuple[PrefillChunk, ...]:
        """In the order of their forwards."""
        return tuple(replace(chunk, joins=place > 0) for read in self._reads for place, chunk in enumerate(read.chunks))

    def take(self, request: SchedulerRequest) -> None:
        """Plan as much of the request's remaining prefill as the step still has room for."""
        start, behind = request.computed, 0
        while not self.full:
            end, read = self._next(request, start, behind)
            if end is None:
                self.full = True
                return
            last = end == request.prefill
            chunk = PrefillChunk(id=request.id, start=start, end=end, last=last)
            behind = self._add(chunk, read, joinable=self._joinable(request, end - start)) + 1
            if last:
                self._rows += 1
                self._context += request.tokens
                return
            start = end

    def _joinable(self, request: SchedulerRequest, size: int) -> bool:
        # One token goes to another place in a ring than several do.
        return self._together and not request.apart and size > 1

    def _add(self, chunk: PrefillChunk, number: int | None, *, joinable: bool) -> int:
        """Put a chunk into a planned forward, or (None) into one of its own behind all others; returns its number."""
        if number is None:
            self._reads.append(Read([], 0, 0, joinable))
            number = len(self._reads) - 1
        read, size = self._reads[number], chunk.end - chunk.start
        tokens, ms = self._added(read, chunk.start, size)
        self._tokens_left -= tokens
        self._spent_ms += ms
        read.chunks.append(chunk)
        read.start, read.longest = max(read.start, chunk.start), max(read.longest, size)
        return number

    def _added(self, read: Read, start: int, size: int) -> tuple[int, float]:
        """Tokens and milliseconds by which a forward grows with a chunk of ``size`` more."""
        count, longest = len(read.chunks), max(read.longest, size)
        after = self._costs.prefill_ms(max(read.start, start), longest, count + 1)
        before = self._costs.prefill_ms(read.start, read.longest, count)
        return (count + 1) * longest - count * read.longest, after - before

    def _joined(self, request: SchedulerRequest, start: int, size: int, behind: int) -> tuple[int | None, int, float]:
        """The cheapest way to read ``size`` tokens from ``start`` on: with which forward, from number ``behind`` on,
        or alone (None); and by how many tokens and milliseconds the step grows."""
        found: tuple[int | None, int, float] = (None, size, self._costs.prefill_ms(start, size))
        if not self._joinable(request, size):
            return found
        for number, read in enumerate(self._reads[behind:], behind):
            tokens, ms = self._added(read, start, size)
            count, longest, before = len(read.chunks) + 1, max(read.longest, size), max(read.start, start)
            fits = count * (before + longest) <= self._most_positions and tokens <= self._tokens_left
            scored = count * longest <= self._budget.chunk_after(before)
            if fits and scored and read.open and ms < found[2]:
                found = (number, tokens, ms)
        return found

    def _next(self, request: SchedulerRequest, start: int, behind: int) -> tuple[int | None, int | None]:
        """Where the next piece from ``start`` ends, None when it has to wait for another step; and which forward, from
        number ``behind`` on, it joins, None for one of its own."""
        if self._steady:
            return self._steadily(request, start), None
        aligned = request.prefill // self._grid * self._grid
        target = aligned if start < aligned else request.prefill
        target = next((stop for stop in request.stops if start < stop < target), target)
        size = target - start
        finishes = target == request.prefill
        time_left = self._time_left_ms(request if finishes else None)
        room = min(self._tokens_left, max(self._grid, self._budget.chunk_after(start)))
        read, tokens, ms = self._joined(request, start, size, behind)
        if size <= room and tokens <= self._tokens_left and ms <= time_left:
            return target, read
        if start >= aligned:
            return (None, None) if self._reads else (target, None)
        # A finishing piece that does not fit whole stops a block short, for its adoption would lengthen the decode.
        most = size - self._grid if finishes else size
        count = min(most, room, self._costs.tokens_within(start, self._time_left_ms(None)))
        end = (start + count) // self._grid * self._grid
        if end <= start and not self._reads:
            end = (start // self._grid + 1) * self._grid
        return (end if end > start else None), None

    def _steadily(self, request: SchedulerRequest, start: int) -> int | None:
        """The same for chunks that never depend on what else there is to do."""
        end = min((start // self._steady + 1) * self._steady, request.prefill)
        time_left = self._time_left_ms(request if end == request.prefill else None)
        fits = end - start <= self._tokens_left and self._costs.prefill_ms(start, end - start) <= time_left
        return end if fits or not self._reads else None

    def _time_left_ms(self, adopting: SchedulerRequest | None) -> float:
        """Prefill time this step can still spend. Unlimited while there is no row that waits for its next token."""
        if self._rows == 0:
            return math.inf
        rows, context = self._rows, self._context
        if adopting is not None:
            rows, context = rows + 1, context + adopting.tokens
        return self._max_itl_ms - self._slowdown * self._costs.decode_ms(rows, context) - self._spent_ms
