"""Cuts prompts into the chunks of one step, within its token and time budgets. Pure, engine thread.

Chunks end on the grid except the tail of a prompt, which is a chunk of its own: a prompt whose beginning comes from a
prefix cache then has the same last chunks as one computed afresh.
"""

from __future__ import annotations

import math

from millpond.schedule.costs import CostModel
from millpond.schedule.request import SchedulerRequest
from millpond.types import PrefillChunk


class Packer:
    """Collects the ``chunks`` of one step; ``full`` once the next piece in line no longer fits.

    The first piece always fits, at least one grid block or tail of it: slow decoding never stops prefill for good.
    """

    def __init__(
        self,
        costs: CostModel,
        *,
        max_itl_ms: float,
        max_chunk: int,
        grid: int,
        lengths: list[int],
        slowdown: float = 1.0,
    ) -> None:
        """``lengths``: tokens held by each decoding row. ``max_chunk``: most prompt tokens in the step. ``slowdown``:
        how many times as long as a plain one its decode forward takes."""
        self.chunks: list[PrefillChunk] = []
        self.full = False
        self._costs = costs
        self._max_itl_ms = max_itl_ms
        self._grid = grid
        self._tokens_left = max_chunk // grid * grid
        self._rows = len(lengths)
        self._context = sum(lengths)
        self._slowdown = slowdown
        self._spent_ms = 0.0

    def take(self, request: SchedulerRequest) -> None:
        """Plan as much of the request's remaining prefill as the step still has room for."""
        start = request.computed
        while not self.full:
            end = self._next_end(request, start)
            if end is None:
                self.full = True
                return
            last = end == request.prefill
            self.chunks.append(PrefillChunk(id=request.id, start=start, end=end, last=last))
            self._tokens_left -= end - start
            self._spent_ms += self._costs.prefill_ms(start, end - start)
            if last:
                self._rows += 1
                self._context += request.tokens
                return
            start = end

    def _next_end(self, request: SchedulerRequest, start: int) -> int | None:
        """Where the next piece from ``start`` ends; None when it has to wait for another step."""
        aligned = request.prefill // self._grid * self._grid
        target = aligned if start < aligned else request.prefill
        if start < request.stop < target:
            target = request.stop
        size = target - start
        finishes = target == request.prefill
        time_left = self._time_left_ms(request if finishes else None)
        if size <= self._tokens_left and self._costs.prefill_ms(start, size) <= time_left:
            return target
        if start >= aligned:
            return None if self.chunks else target
        # A finishing piece that does not fit whole stops a block short, for its adoption would lengthen the decode.
        most = size - self._grid if finishes else size
        count = min(most, self._tokens_left, self._costs.tokens_within(start, self._time_left_ms(None)))
        end = (start + count) // self._grid * self._grid
        if end <= start and not self.chunks:
            end = (start // self._grid + 1) * self._grid
        return end if end > start else None

    def _time_left_ms(self, adopting: SchedulerRequest | None) -> float:
        """Prefill time this step can still spend. Unlimited while there is no row that waits for its next token."""
        if self._rows == 0:
            return math.inf
        rows, context = self._rows, self._context
        if adopting is not None:
            rows, context = rows + 1, context + adopting.tokens
        return self._max_itl_ms - self._slowdown * self._costs.decode_ms(rows, context) - self._spent_ms
