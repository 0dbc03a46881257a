"""The engine loop: take messages, plan a step, read prompts, draw tokens, tell the clients. One thread owns it all.

A decode step is built before the one ahead of it has been read ("in flight"), which hides Python behind the device. A
GPU gets it at once, too, if that copies nothing; a CPU, whose queue holds the caller up, only when the tokens ahead are
out. Rows join and leave only when nothing is in flight; draft tokens wait for the tokens that they go on from, and so
does what picks the tokens of a step in which some row's draw depends on them (penalties, grammars). Requests come and
go in requests.py; what is done when something fails is in recovery.py.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from collections.abc import Sequence as Many

from msgspec.structs import replace

from millpond.engine.executor import Executor
from millpond.engine.grammars import Compiled, Grammars
from millpond.engine.inflight import InflightStep
from millpond.engine.link import Inbox, Outbox
from millpond.engine.orders import Offered
from millpond.engine.prepare import Prepared
from millpond.engine.recovery import Recovery
from millpond.engine.requests import Requests
from millpond.engine.sequence import Status
from millpond.engine.speculation import Speculator
from millpond.engine.stats import EngineStats
from millpond.prefix.disk.events import Found, Gone, Loaded, Opened, Saved
from millpond.schedule.scheduler import Scheduler
from millpond.types import MOST_DRAFT_TOKENS, Delta, Finish, PrefillChunk, StepPlan
from millpond.wire import Beat, Cancel, Deltas, Explain, Start, Stop, Submit

MOST_VERIFIED = 256
"""Rows times columns of a forward with draft tokens: sampling needs a few numbers per column and token that exists."""
TRIM_SHARE = 0.5
"""Above this share of the memory limit, the arena is cut to what its rows need before more prompts are read."""
REST_SECONDS = 3.0
"""An engine without requests for this long gives its rows' memory back. The next ones often come sooner."""


class Engine:
    """Runs requests from ``inbox`` until a Stop arrives; results go to ``outbox``."""

    def __init__(
        self,
        ready: Prepared,
        scheduler: Scheduler,
        executor: Executor,
        speculator: Speculator,
        inbox: Inbox,
        outbox: Outbox,
    ) -> None:
        self._model = ready.model
        self._launches_ahead = ready.capabilities.pipelined and not ready.model.on_cpu
        """A step is launched before the one ahead of it has been read. On a CPU both would want the same cores; where
        it would copy what the rows hold, waiting is cheaper."""
        self._costs = ready.costs
        self._limit_bytes = ready.budget.limit_bytes
        self._scheduler = scheduler
        self._executor = executor
        self._prefixes = executor.prefixes
        self._speculator = speculator
        self._inbox = inbox
        self._outbox = outbox
        self._sequences = executor.sequences
        grammars = Grammars(ready.vocabulary, inbox.put)
        self._requests = Requests(ready.model, scheduler, executor, speculator, grammars, outbox)
        self._recovery = Recovery(scheduler, executor, speculator, self._requests)
        self._inflight: InflightStep | None = None
        self._last_read = 0.0
        self._done = 0
        """Steps."""
        self._stats = EngineStats()
        self._stalled = False
        """Nobody could do anything in the last turn: everybody waits for the disk."""
        self._idle_since: float | None = None
        """Seconds, monotonic: since when there has been no request, while memory for rows is still held."""
        self._stopping = False

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until a Stop arrives, then cancel what is left."""
        self._report()
        while not self._stopping:
            self.turn()
        self._settle()
        for name in list(self._sequences):
            self._requests.end(name, Finish.CANCELLED)
        self._requests.free()
        self._requests.close()
        self._report()
        self._executor.close()
        self._prefixes.close(self._inbox)

    def turn(self) -> None:
        """Receive, plan, execute, read: at most one step is dispatched and one is read."""
        self._receive()
        if self._requests.leaving:
            self._settle()
            self._requests.free()
        plan = self._plan()
        if self._inflight is not None and not self._can_follow(self._inflight, plan):
            self._settle()
        elif not plan.empty:
            ahead = self._execute(plan)
            if ahead is not None:
                self._read(ahead)
                self._launch()
            self._end_faulty()
        self._report()

    # --- receive ----------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take the messages that have come; wait for one when there is nothing else to do."""
        without_work = self._scheduler.idle
        idle = self._inflight is None and not self._requests.leaving and (self._scheduler.idle or self._stalled)
        while not self._stopping:
            try:
                message = self._inbox.get(block=idle, timeout=self._patience() if idle else None)
            except queue.Empty:
                break
            idle = False
            match message:
                case Submit(request):
                    self._idle_since = None
                    self._requests.submit(request)
                case Cancel(name):
                    self._requests.end(name, Finish.CANCELLED)
                case Compiled():
                    self._idle_since = None
                    self._requests.compiled(message)
                case Explain():
                    self._requests.explain(message)
                case Stop():
                    self._stopping = True
                case Opened() | Found() | Loaded() | Saved() | Gone():
                    self._prefixes.on_event(message)
                case Offered():
                    self._executor.group.heard(message)
                case Start():
                    raise ValueError("a running engine cannot be started")
        if without_work and not self._scheduler.idle:
            self._report()  # now: should the very first step hang, it must be known that there is work

    def _patience(self) -> float | None:
        """How long to wait for a message when there is nothing else to do; None: for ever."""
        now = time.monotonic()
        if not self._scheduler.idle or self._executor.lane.nbytes + self._speculator.nbytes == 0:
            self._idle_since = None
            return self._prefixes.patience(now)
        if self._idle_since is None:
            self._idle_since = now
        left = self._idle_since + REST_SECONDS - now
        if left > 0:
            return left
        self.rest()
        return None

    def rest(self) -> None:
        """Give back the memory that rows leave behind. Call it when there are none."""
        self._idle_since = None
        self._executor.trim()
        self._speculator.rest()
        self._report()

    # --- plan -------------------------------------------------------------------------------------------------

    def _plan(self) -> StepPlan:
        """What to do next."""
        now = time.monotonic()
        room = 0 if self._scheduler.running else self._limit_bytes
        self._prefixes.offer(self._scheduler, self._sequences, now, self._executor.group, room)
        plan = self._scheduler.plan(now)
        self._stalled = plan.empty and self._inflight is None
        return plan

    def _can_follow(self, step: InflightStep, plan: StepPlan) -> bool:
        """Whether ``plan`` may be built while ``step`` is unread: same rows, none about to end, none that still
        waits for its first token, which would come a step later, and no draft tokens before or behind."""
        return (
            not step.drafts
            and not plan.prefill
            and not plan.preempt
            and not self._scheduler.suspects
            and all(self._sequences[name].answered and self._sequences[name].remaining > 1 for name in step.rows)
            and not self._speculator.wants(step.rows, self._sequences)
        )

    def _drafts(self, plan: StepPlan) -> Mapping[str, Many[int]]:
        """What can be guessed for the plan's rows, as far as memory and context reach."""
        rows = [name for name in self._executor.batch.names if name not in plan.preempt]
        joining = [chunk.id for chunk in plan.prefill if chunk.last]
        if not rows or self._scheduler.suspected([*rows, *joining]):
            return {}
        batch = [self._sequences[name] for name in (*rows, *joining)]
        # Short rows of a forward are filled up to its longest, and no position may lie beyond the model's own.
        columns = self._model.context_length - max(len(sequence.tokens) for sequence in batch) + 1
        columns = min(columns, MOST_DRAFT_TOKENS + 1, max(1, MOST_VERIFIED // len(batch)))
        room = self._scheduler.columns(plan, columns) - 1
        return self._speculator.drafts(rows, self._sequences, room, len(joining), reading=bool(plan.prefill))

    # --- execute ----------------------------------------------------------------------------------------------

    def _execute(self, plan: StepPlan) -> InflightStep | None:
        """Do what is planned; its forward is in flight then. Returns the one that was, to be read now, if that is
        still worth it."""
        ahead, self._inflight = self._inflight, None
        drafts = self._drafts(plan) if ahead is None else {}
        begun = time.monotonic()
        executor = self._executor
        self._stats.preempted(len(plan.preempt))
        for name in plan.preempt:
            executor.set_aside(name, kept=True)
        self._begin(plan.prefill)
        if plan.prefill and executor.nbytes > self._limit_bytes * TRIM_SHARE:
            executor.trim()  # the scheduler counts what the rows need, not what the arena still has from before
        executor.fit(self._limit_bytes - max(executor.nbytes, self._scheduler.promised_bytes(plan)))
        read = [chunk for chunks in plan.reads for chunk in self._prefill(chunks)]
        # Of those that are to be read again, nothing is kept of earlier chunks either.
        again = {chunk.id for chunk in read if self._sequences[chunk.id].status is Status.WAITING}
        plan = replace(plan, prefill=tuple(chunk for chunk in read if chunk.id not in again))
        batch = executor.batch.names
        failure: Exception | None = None
        try:
            if batch:
                self._inflight = executor.decode(drafts, begun)
            if self._inflight is not None and (ahead is None or self._launches_ahead):
                executor.launch(self._inflight)
        except Exception as error:  # noqa: BLE001 - model code raises what it likes; one request pays, Recovery logs
            failure = error
        self._scheduler.commit(plan)
        self._done += 1
        if failure is not None:
            self._failed(failure, guessed=bool(drafts))
            return None
        if not batch:
            self._stats.step(time.monotonic() - begun, 0, 0)
        return ahead

    def _end_faulty(self) -> None:
        """Those whose own part of the step could not be made; the step before it they had as any."""
        for name in self._executor.batch.names:
            sequence = self._sequences[name]
            if sequence.fault is not None:
                self._requests.end(name, sequence.fault)

    def _launch(self) -> None:
        """Launch what is left of the step that was built meanwhile, unless reading the one ahead of it has ended it."""
        step = self._inflight
        if step is None:
            return
        try:
            self._executor.launch(step)
        except Exception as error:  # noqa: BLE001 - model code raises what it likes; Recovery logs it
            self._failed(error, guessed=False)

    def _failed(self, error: Exception, *, guessed: bool) -> None:
        """A forward has raised, when it was built, launched or read; ``guessed``: it had draft tokens."""
        self._inflight = None
        self._stats.failed()
        self._recovery.step_failed(error, guessed=guessed)

    def _begin(self, chunks: tuple[PrefillChunk, ...]) -> None:
        """Give every prompt that starts in this step its cache, restored up to its first chunk."""
        begun: list[Delta] = []
        refused: set[str] = set()
        """Requests of which some rank has less than was planned with; all their chunks wait for another step."""
        for chunk in chunks:
            sequence = self._sequences[chunk.id]
            if sequence.status is not Status.WAITING or chunk.id in refused:
                continue
            first = sequence.report is None
            try:
                there = self._executor.begin(chunk.id, chunk.start)
            except Exception as error:  # noqa: BLE001 - model code raises what it likes; Recovery logs it
                self._recovery.restore_failed(chunk.id, error)
                continue
            if not there:
                refused.add(chunk.id)
            elif first:
                begun.append(Delta(chunk.id, [], prefix=sequence.report))
        if begun:
            self._outbox.send(Deltas(begun))

    def _prefill(self, chunks: tuple[PrefillChunk, ...]) -> list[PrefillChunk]:
        """Run the chunks of one forward, adopting prompts after their last. Returns those that were read: of others
        the client has been told, or they are read again."""
        # An earlier chunk of this very step has failed, or was not begun, where a prompt is not being read.
        chunks = tuple(chunk for chunk in chunks if self._sequences[chunk.id].status is Status.READING)
        if not chunks:
            return []
        started = time.monotonic()
        try:
            self._executor.read(chunks)
        except Exception as error:  # noqa: BLE001 - model code raises what it likes; Recovery logs it
            self._recovery.read_failed([chunk.id for chunk in chunks], error)
            return []
        done = [chunk for chunk in chunks if self._chunk_read(chunk)]
        elapsed = (time.monotonic() - started) * 1000
        longest = max(chunk.end - chunk.start for chunk in chunks)
        if not any(self._sequences[chunk.id].apart for chunk in chunks):
            self._costs.observe_prefill(max(chunk.start for chunk in chunks), longest, elapsed, len(chunks))
        return done

    def _chunk_read(self, chunk: PrefillChunk) -> bool:
        try:
            self._executor.chunk_read(chunk)
            self._speculator.chunk_read(self._sequences[chunk.id], chunk.end - chunk.start)
            if chunk.last and self._sequences[chunk.id].pooled is not None:
                self._requests.pooled(chunk.id)
        except Exception as error:  # noqa: BLE001 - model code raises what it likes; Recovery logs it
            self._recovery.chunk_failed(chunk.id, error)
            return False
        sequence = self._sequences[chunk.id]
        if sequence.scores:
            self._outbox.send(Deltas([Delta(chunk.id, [], prompt_logprobs=sequence.scores)]))
            sequence.scores = []
        self._stats.chunk(chunk)
        return True

    # --- read -------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Read the step in flight, if any: afterwards rows may join and leave."""
        step, self._inflight = self._inflight, None
        if step is not None:
            self._read(step)

    def _read(self, step: InflightStep) -> None:
        """Take in what a step has drawn, tell the clients, and learn how long it took."""
        try:
            self._executor.launch(step)
            drawn = step.drawn()
        except Exception as error:  # noqa: BLE001 - a lazy forward raises when it is evaluated; Recovery logs it
            self._failed(error, guessed=bool(step.drafts))
            return
        now = time.monotonic()
        seconds = now - max(step.begun, self._last_read)
        milliseconds = (now - max(step.dispatched, self._last_read)) * 1000
        self._last_read = now
        deltas: list[Delta] = []
        held = [self._requests.take(step, row, deltas) for row in drawn]
        if deltas:
            self._outbox.send(Deltas(deltas))
        tokens = sum(len(delta.tokens) + (delta.finish is Finish.STOP) for delta in deltas)
        self._stats.step(seconds, len(drawn), tokens, step.draft_tokens)
        if step.drafts:
            self._speculator.verified(drawn, held, step.context_tokens, milliseconds)
            self._scheduler.slowdown = self._speculator.slowdown(len(drawn), step.columns)
        else:
            self._costs.observe_decode(len(drawn), step.context_tokens, milliseconds)
            self._speculator.plain()
            self._scheduler.slowdown = 1.0
        self._executor.took(step, tuple(tuple(row.tokens) for row in drawn), tuple(held))
        self._recovery.step_read(step.rows)

    def _report(self) -> None:
        self._outbox.report(
            Beat(
                step=self._done,
                running=self._scheduler.running,
                waiting=self._scheduler.waiting,
                kv_bytes=self._executor.nbytes + self._speculator.nbytes,
                wait_seconds=self._scheduler.wait_seconds(),
                counters=self._stats.counters(self._speculator.counters()),
                prefix=self._prefixes.load(),
            )
        )
