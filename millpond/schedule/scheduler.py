"""Decides what every engine step does: who prefills how much, who is adopted, who gives up a row.

Pure state machine: no clock, no I/O, no randomness; the engine thread is its only user. Invariants:

- plan() changes nothing; every row decodes in every step.
- Rows and started prefills together never exceed max_batch, and their promised memory never exceeds the budget.
- Of two waiting requests of equal priority only finitely many later ones can ever go before the older.

The round of one step, and who may change what when:

1. ``plan = scheduler.plan(now)``.
2. Execute it. A request that holds no row may be removed meanwhile (its chunk failed, say), or requeued and its chunks
   taken out of the plan: commit skips it. Nothing else may change before the commit, except that preempted ones may be
   requeued, in the order of ``plan.preempt``.
3. ``scheduler.commit(plan)``, also when the decode failed. It moves preempted requests back to the queue itself, as
   long as their row was plus the token not yet in it; a ``requeue`` before or after only corrects that number.
4. Only now ``remove`` the rows that finished, and ``requeue`` whatever else lost its KV.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from millpond.memory.budget import MemoryBudget
from millpond.schedule.admission import MemoryReservation, choose_victims
from millpond.schedule.costs import CostModel
from millpond.schedule.packing import Packer
from millpond.schedule.request import SchedulerRequest
from millpond.types import GRID, StepPlan

HEAD_START = 0.5
"""Share of the remaining prefill time that counts for a request already begun: only work less than half as long as
what is left of it goes before it."""


LEAST_SHARE = 0.1
"""Share of the time that prefill gets at least beside decoding, as far as predictions go."""
FIRST_ANSWER = 256.0
"""Tokens that an answer is expected to have before any was seen."""
ANSWER_WEIGHT = 0.1
"""Share of the latest answer's length in what is expected of the next ones."""
FAIR_SECONDS = 2.0
"""With several clients waiting, each answer that a client has before this one counts like so many seconds of work."""


class NeverFits(Exception):  # noqa: N818 - reads as the fact it states
    """A request that no amount of waiting can make fit in memory."""


@dataclass(frozen=True)
class Limits:
    """What a step may do. ``max_chunk`` and ``grid`` are tokens, ``max_itl_ms`` milliseconds between two tokens."""

    max_batch: int
    max_itl_ms: float
    max_chunk: int
    grid: int = GRID
    together: bool = False
    """Several prompts may be read in one forward."""
    steady: int = 0
    """What a prompt's chunks are, whatever else there is to do: so many tokens each, but for the last, and nobody is
    preempted, for rows are promised all that they can come to need. 0: as it pays."""
    age_weight: float = 0.5
    """Seconds of predicted prefill that one second of waiting makes up for."""

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}, must be at least 1")
        if self.grid < 1:
            raise ValueError(f"grid is {self.grid}, must be at least 1")
        if self.max_chunk < self.grid:
            raise ValueError(f"max_chunk is {self.max_chunk}, must be at least the grid of {self.grid}")
        if self.steady % self.grid or not 0 <= self.steady <= self.max_chunk:
            raise ValueError(f"steady is {self.steady}, must be a multiple of {self.grid} up to {self.max_chunk}")


class Scheduler:
    """The waiting requests, the rows, and the plan of the next step. ``name`` is a request's id throughout."""

    def __init__(self, limits: Limits, budget: MemoryBudget, costs: CostModel) -> None:
        self._limits = limits
        self._budget = budget
        self._costs = costs
        self._requests: dict[str, SchedulerRequest] = {}
        self._rows: dict[str, SchedulerRequest] = {}
        """Who has a row; which one is not decided here."""
        self._step = 0
        self._added = 0
        self._answer = FIRST_ANSWER
        """Tokens of a typical answer, learnt: most end long before their max_tokens."""
        self.slowdown = 1.0
        """How many times as long as a plain one the latest decode forward took, because of draft tokens; set by whoever
        reads steps."""
        self.together = limits.together
        """Several prompts may be read in one forward; whoever sees such forwards fail says no."""
        self._left: str | None = None
        """The client whose answer left a row last."""

    # --- requests come and go ---------------------------------------------------------------------------------

    def add(self, name: str, prompt_tokens: int, max_tokens: int, priority: int, client: str, now: float) -> None:
        """Queue a new request.

        Raises NeverFits when it does not fit in the empty budget, its recomputation after a preemption included;
        ValueError for a known name or sizes below 1.
        """
        if name in self._requests:
            raise ValueError(f"request {name!r} is already scheduled")
        if prompt_tokens < 1 or max_tokens < 1:
            raise ValueError(f"prompt_tokens ({prompt_tokens}) and max_tokens ({max_tokens}) must be at least 1")
        total = prompt_tokens + max_tokens
        peak = self._budget.alone_bytes(total)
        if peak > self._budget.limit_bytes:
            raise NeverFits(
                f"prompt ({prompt_tokens} tokens) and max_tokens ({max_tokens}) need {peak} bytes of key-value memory, "
                f"the limit is {self._budget.limit_bytes} bytes"
            )
        self._requests[name] = SchedulerRequest(
            name, prompt_tokens, total, priority, client, now, self._added, prompt_tokens, whole=self._limits.steady > 0
        )
        self._added += 1

    def remove(self, name: str) -> None:
        """Forget a request that finished, failed or was cancelled. An unknown name is fine."""
        request = self._requests.pop(name, None)
        if request is not None and request.in_row:
            self._answer += ANSWER_WEIGHT * (request.length - request.prompt - self._answer)
            self._left = request.client
            del self._rows[name]

    def requeue(self, name: str, tokens: int, now: float, probation: bool = False, apart: bool = False) -> None:
        """Its KV is lost, wherever it was: it waits again and is computed from its ``tokens`` (prompt and answer).

        It keeps its arrival time. ``probation`` marks one that was in a failing step, until ``proven``, and ``apart``
        one whose prompt was read in a failing forward with others; marks of earlier failures stay. Raises KeyError for
        an unknown name, ValueError for an impossible size.
        """
        request = self._requests[name]
        if not 1 <= tokens <= request.total:
            raise ValueError(f"request {name!r} is requeued with {tokens} tokens, allowed are 1 to {request.total}")
        self._rows.pop(name, None)
        request.back_to_waiting(tokens)
        request.arrival = min(request.arrival, now)
        request.probation = request.probation or probation
        request.apart = request.apart or apart

    def offer(
        self, name: str, cached: int, wants: bytes | None, held: bool = False, stops: tuple[int, ...] = ()
    ) -> None:
        """What the prefix cache can do for a request without a row, told anew before each plan.

        ``cached`` tokens will be restored when its prefill starts, if it has not. ``wants`` names the block that it
        computes next: one request at a time computes a block, others that want the same wait for it. ``held``: it must
        not start yet. ``stops``: a chunk must end at each of these positions, ascending.

        Raises KeyError for an unknown name, ValueError for an impossible size.
        """
        request = self._requests[name]
        if not 0 <= cached <= request.prefill:
            raise ValueError(f"request {name!r} is offered {cached} tokens, at most {request.prefill} can be restored")
        request.cached, request.wants, request.held, request.stops = cached, wants, held, stops

    def proven(self, name: str) -> None:
        """A step that decoded this request succeeded: it is no longer on probation."""
        if name in self._requests:
            self._requests[name].probation = False

    # --- what there is ----------------------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[str, ...]:
        """Ids of the requests that hold a row, in no order that means anything."""
        return tuple(self._rows)

    @property
    def queue(self) -> tuple[tuple[str, int], ...]:
        """Requests without a row and how many of their tokens have been read, in order of arrival."""
        return tuple((request.id, request.done) for request in self._requests.values() if not request.in_row)

    @property
    def waiting(self) -> int:
        """How many requests hold no row, started prefills included."""
        return len(self._requests) - len(self._rows)

    @property
    def running(self) -> int:
        """How many requests hold a row."""
        return len(self._rows)

    def wait_seconds(self) -> float:
        """Predicted: how long a request added now would wait for its prefill, if it went last."""
        requests = self._requests.values()
        queued = [request for request in requests if not request.in_row]
        if not queued:
            return 0.0
        limits, costs = self._limits, self._costs
        reading = sum(costs.prefill_ms(request.computed, request.prefill - request.computed) for request in queued)
        context = sum(request.length for request in self._rows.values())
        step = costs.decode_ms(len(self._rows), context)
        beside = reading / max(LEAST_SHARE, 1.0 - step / limits.max_itl_ms)
        places = self._places()
        ahead = len(requests) + 1 - places
        if ahead <= 0:
            return beside / 1000.0
        left = sum(min(request.total - max(request.length, request.prefill), self._answer) for request in requests)
        step = costs.decode_ms(places, context * places // max(1, len(self._rows)))
        leaving = ahead * left / len(requests) * step / places
        return max(beside, reading + leaving) / 1000.0

    def _places(self) -> int:
        """How many requests can be under way at once: as many as there are rows, or as memory lets begin."""
        reserved = MemoryReservation(self._budget, [request for request in self._requests.values() if request.holds])
        for request in self._requests.values():
            if reserved.count >= self._limits.max_batch:
                break
            if not request.holds:
                if not reserved.has_room_for(request, self._limits.grid):
                    return reserved.count
                reserved.add(request)
        return self._limits.max_batch

    @property
    def idle(self) -> bool:
        return not self._requests

    @property
    def suspects(self) -> tuple[str, ...]:
        """Rows on probation: if the step fails, one of these is to blame. Never more than one."""
        return tuple(name for name, request in self._rows.items() if request.probation)

    def suspected(self, names: Sequence[str]) -> bool:
        """Whether one of these, rows or about to be, is on probation."""
        return any(self._requests[name].probation for name in names)

    # --- steps ------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """What the next step does. Changes nothing: called twice, it gives equal plans.

        ``preempt`` names requests that give up their row or their started prefill, whichever they have.
        """
        victims = choose_victims(self._budget, [request for request in self._requests.values() if request.holds])
        rows = [request for request in self._rows.values() if request not in victims]
        return StepPlan(
            step=self._step,
            preempt=tuple(victim.id for victim in victims),
            prefill=self._pack(rows, victims, now).chunks,
            rows=tuple(request.id for request in rows),
        )

    def promised_bytes(self, plan: StepPlan) -> int:
        """The memory that executing ``plan`` relies on, for everybody who holds a row or a prefill afterwards."""
        return self._after(plan).promised_bytes

    def columns(self, plan: StepPlan, most: int) -> int:
        """How many tokens per row, from 1 up to ``most``, the forward of ``plan`` may take in within the memory.

        All rows of a forward have equally many columns, so the longest row decides. Rows never get longer arrays only
        for padding or for tokens that may be refused.
        """
        reserved = self._after(plan)
        return max(1, min(most, reserved.columns_left))

    def grew(self, name: str, tokens: int) -> None:
        """The committed step drew so many tokens for this row, not one. Raises KeyError for an unknown name."""
        request = self._requests[name]
        request.length += tokens - 1

    def commit(self, plan: StepPlan) -> None:
        """The engine has executed ``plan``.

        Preempted requests wait again. Chunks move their request on; one whose last chunk ran gets the next free row.
        Every row, the new ones included, is one token longer; see ``grew``.
        Raises ValueError, and changes nothing, when the plan is not the current one or its rows have changed.
        """
        rows = {name: request for name, request in self._rows.items() if name not in plan.preempt}
        if plan.step != self._step or plan.rows != tuple(rows):
            raise ValueError(f"plan {plan.step} no longer matches the rows of step {self._step}")
        preempted = [self._requests[name] for name in plan.preempt if name in self._requests]
        self._rows = rows
        for request in preempted:
            request.preempted += 1
            request.back_to_waiting(request.need)
        for chunk in plan.prefill:
            reading = self._requests.get(chunk.id)
            if reading is not None:
                reading.done = chunk.end
                if chunk.last:
                    reading.in_row, reading.length, reading.done = True, reading.prefill, 0
                    self._rows[chunk.id] = reading
        for request in self._rows.values():
            request.length += 1
        self._step += 1

    def check(self) -> None:
        """Assert every invariant of the state; for tests."""
        holders = [request for request in self._requests.values() if request.holds]
        assert [request.id for request in self._requests.values()] == list(self._requests)
        assert sorted(self.rows) == sorted(request.id for request in self._requests.values() if request.in_row)
        assert len(holders) <= self._limits.max_batch
        assert sum(request.probation for request in holders) <= 1
        for request in self._requests.values():
            assert 1 <= request.tokens <= request.total
            if request.in_row:
                assert request.done == 0
                assert request.tokens <= request.length <= request.total
            else:
                assert request.length == 0
                assert 0 <= request.done <= request.prefill
                assert request.done % self._limits.grid == 0
        longest = max((request.length if request.in_row else request.tokens for request in holders), default=0)
        promised = sum(self._budget.prefill_bytes(request.prefill) for request in holders if not request.in_row)
        assert self._budget.arena_bytes(len(holders), longest) + promised <= self._budget.limit_bytes

    # --- inside -----------------------------------------------------------------------------------------------

    def _after(self, plan: StepPlan) -> MemoryReservation:
        """What is promised once ``plan`` has been executed."""
        starting = {chunk.id for chunk in plan.prefill}
        left = [e for e in self._requests.values() if (e.holds or e.id in starting) and e.id not in plan.preempt]
        return MemoryReservation(self._budget, left)

    def _pack(self, rows: list[SchedulerRequest], victims: list[SchedulerRequest], now: float) -> Packer:
        """Fill the step with prefill, best request first."""
        packer = Packer(
            self._costs,
            self._budget,
            max_itl_ms=self._limits.max_itl_ms,
            max_chunk=self._limits.max_chunk,
            grid=self._limits.grid,
            lengths=[request.need for request in rows],
            slowdown=self.slowdown,
            together=self.together,
            steady=self._limits.steady,
        )
        started = [request for request in self._requests.values() if request.started and request not in victims]
        holders = rows + started
        reserved = MemoryReservation(self._budget, holders)
        suspected = any(request.probation for request in holders)
        may_start = not victims and reserved.count < self._limits.max_batch
        waiting = [request for request in self._requests.values() if not request.in_row] if may_start else started
        computing = {request.wants: request.priority for request in started if request.wants is not None}
        for request in self._ordered(waiting, now):
            if packer.full:
                break
            if not request.started:
                if not may_start or request.held or (suspected and request.probation):
                    continue
                if request.wants is not None and computing.get(request.wants, request.priority - 1) >= request.priority:
                    continue  # the block that it needs next is being computed: it will restore that one
                # Nobody starts past the first that has to wait for memory, or a large request would wait for ever.
                may_start = reserved.count < self._limits.max_batch and reserved.has_room_for(
                    request, self._limits.grid
                )
                if not may_start:
                    continue
                reserved.add(request)
                suspected = suspected or request.probation
                if request.wants is not None:
                    computing[request.wants] = request.priority
            packer.take(request)
        return packer

    def _ordered(self, waiting: list[SchedulerRequest], now: float) -> list[SchedulerRequest]:
        """Best first: priority, then little work left, where every second of waiting makes work count for less, and
        every answer that its client has already, running or earlier in the queue, makes it count for more.

        Waiting makes up for work, never for a client's other answers: however long a flood has waited, somebody else's
        request need not wait for all of it.
        """
        age_weight, prefill_ms = self._limits.age_weight, self._costs.prefill_ms
        ahead = self._ahead(waiting)

        def key(request: SchedulerRequest) -> tuple[int, float, float, int]:
            seconds = prefill_ms(request.computed, request.prefill - request.computed) / 1000.0
            if request.done > 0 or request.preempted > 0:
                seconds *= HEAD_START
            seconds -= age_weight * (now - request.arrival)
            fair = FAIR_SECONDS * ahead[request.id] + max(0.0, seconds) if ahead else 0.0
            return -request.priority, fair, seconds, request.number

        return sorted(waiting, key=key)

    def _ahead(self, waiting: list[SchedulerRequest]) -> dict[str, int]:
        """How many answers each waiting one's client has before it; nothing when a single client waits."""
        if len({request.client for request in waiting}) < 2:
            return {}
        counts = Counter(request.client for request in self._rows.values())
        if not self._rows and self._left is not None:
            counts[self._left] += 1  # with a single row, whoever has just had it would always seem to have had nothing
        found = {}
        for request in sorted(waiting, key=lambda request: request.number):
            found[request.id] = counts[request.client]
            counts[request.client] += 1
        return found
