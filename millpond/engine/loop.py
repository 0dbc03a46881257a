"""The engine loop: take messages, plan a step, read prompts, draw tokens, tell the clients. One thread owns it all.

A decode step is built before the one ahead of it has been read ("in flight"), which hides Python behind the device. A
GPU gets it at once, too; a CPU, whose queue holds the caller up, only when the tokens ahead are out. Rows join and
leave only when nothing is in flight; a step whose draw depends on earlier tokens (penalties, or draft tokens that go on
from them) waits for them. Every request ends in exactly one place, ``_end``.
"""

from __future__ import annotations

import logging
import queue
import time
from contextlib import suppress

import mlx.core as mx
from msgspec.structs import replace

from millpond.engine.executor import Executor
from millpond.engine.inflight import Drawn, InflightStep
from millpond.engine.link import Inbox, Outbox
from millpond.engine.orders import GroupBroken, Offered
from millpond.engine.refusals import failure, impossible, unknown
from millpond.engine.sequence import Health, Sequence, Status
from millpond.engine.speculation import Speculator
from millpond.engine.stats import EngineStats
from millpond.model.load import LoadedModel
from millpond.model.probe import Capabilities
from millpond.prefix.disk.events import Found, Gone, Loaded, Opened, Saved
from millpond.sample.sampler import Picks
from millpond.schedule.costs import CostModel
from millpond.schedule.scheduler import NeverFits, Scheduler
from millpond.types import (
    MOST_DRAFT_TOKENS,
    Delta,
    ErrorKind,
    Finish,
    PrefillChunk,
    Request,
    StepPlan,
    TokenLogprob,
    Verdict,
)
from millpond.wire import Beat, Cancel, Deltas, Explain, Explained, Failed, Start, Stop, Submit

log = logging.getLogger(__name__)

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
        model: LoadedModel,
        capabilities: Capabilities,
        scheduler: Scheduler,
        costs: CostModel,
        limit_bytes: int,
        executor: Executor,
        speculator: Speculator,
        inbox: Inbox,
        outbox: Outbox,
    ) -> None:
        self._model = model
        self._capabilities = capabilities
        self._scheduler = scheduler
        self._costs = costs
        self._limit_bytes = limit_bytes
        self._executor = executor
        self._prefixes = executor.prefixes
        self._speculator = speculator
        self._inbox = inbox
        self._outbox = outbox
        self._sequences = executor.sequences
        self._leaving: list[str] = []
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
            self._end(name, Finish.CANCELLED)
        self._free_leavers()
        self._report()
        self._executor.close()
        self._prefixes.close(self._inbox)

    def turn(self) -> None:
        """One round of the loop: at most one step is planned, dispatched and read."""
        idle = self._scheduler.idle
        self._receive()
        if idle and not self._scheduler.idle:
            self._report()  # now: should the very first step hang, it must be known that there is work
        if self._leaving:
            self._settle()
            self._free_leavers()
        now = time.monotonic()
        self._prefixes.offer(self._scheduler, self._sequences, now, self._executor.ranks)
        plan = self._scheduler.plan(now)
        self._stalled = plan.empty and self._inflight is None
        if self._inflight is not None and not self._can_follow(self._inflight, plan):
            self._settle()
        elif not plan.empty:
            self._execute(plan if self._inflight is not None else self._with_drafts(plan))
        self._report()

    def _receive(self) -> None:
        idle = self._inflight is None and not self._leaving and (self._scheduler.idle or self._stalled)
        while not self._stopping:
            try:
                message = self._inbox.get(block=idle, timeout=self._patience() if idle else None)
            except queue.Empty:
                return
            idle = False
            match message:
                case Submit(request):
                    self._submit(request)
                case Cancel(name):
                    self._end(name, Finish.CANCELLED)
                case Explain():
                    self._explain(message)
                case Stop():
                    self._stopping = True
                case Opened() | Found() | Loaded() | Saved() | Gone():
                    self._prefixes.on_event(message)
                case Offered():
                    self._executor.ranks.heard(message)
                case Start():
                    raise ValueError("a running engine cannot be started")

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

    def _explain(self, asked: Explain) -> None:
        wrong = unknown(asked.tokens, self._model)
        if wrong:
            self._outbox.send(Failed(asked.id, ErrorKind.INVALID, wrong))
            return
        try:
            self._outbox.send(Explained(asked.id, self._prefixes.explain(asked.tokens, asked.cache_salt)))
        except Exception as error:  # whatever it is, it is about this request alone
            log.exception("explaining %s failed", asked.id)
            self._outbox.send(failure(asked.id, error))

    def _submit(self, request: Request) -> None:
        self._idle_since = None
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id!r} is already in use")
        wrong = impossible(request, self._model)
        if not wrong:
            tokens, params = len(request.tokens), request.params
            try:
                self._scheduler.add(
                    request.id, tokens, params.max_tokens, request.priority, request.client, time.monotonic()
                )
            except NeverFits as error:
                wrong = str(error)
        if wrong:
            self._outbox.send(Failed(request.id, ErrorKind.INVALID, wrong))
            return
        try:
            sequence = self._executor.arrive(request)
        except GroupBroken:
            raise
        except Exception as error:  # whatever it is, it is about this request alone
            log.exception("request %s cannot be begun", request.id)
            self._scheduler.remove(request.id)
            self._outbox.send(failure(request.id, error))
            return
        self._speculator.arrive(sequence)

    # --- a step -----------------------------------------------------------------------------------------------

    def _can_follow(self, step: InflightStep, plan: StepPlan) -> bool:
        """Whether ``plan`` may be dispatched while ``step`` is unread: same rows, none about to end, none that still
        waits for its first token, which would come a step later, and no draft tokens before or behind."""
        return (
            self._capabilities.pipelined
            and not step.drafts
            and plan.rows == step.rows
            and not plan.prefill
            and not plan.preempt
            and not self._executor.needs_history
            and not self._scheduler.suspects
            and all(self._sequences[name].answered and self._sequences[name].remaining > 1 for name in plan.rows)
            and not self._speculator.wants(plan.rows, self._sequences)
        )

    def _with_drafts(self, plan: StepPlan) -> StepPlan:
        """The plan with what can be guessed for its rows, as far as memory and context reach."""
        joining = [chunk.id for chunk in plan.prefill if chunk.last]
        if not plan.rows or self._scheduler.suspected([*plan.rows, *joining]):
            return plan
        batch = [self._sequences[name] for name in (*plan.rows, *joining)]
        # Short rows of a forward are filled up to its longest, and no position may lie beyond the model's own.
        columns = self._model.context_length - max(len(sequence.tokens) for sequence in batch) + 1
        columns = min(columns, MOST_DRAFT_TOKENS + 1, max(1, MOST_VERIFIED // len(batch)))
        room = self._scheduler.columns(plan, columns) - 1
        return replace(plan, drafts=self._speculator.drafts(plan.rows, self._sequences, room, len(joining)))

    def _execute(self, plan: StepPlan) -> None:
        ahead, self._inflight = self._inflight, None
        begun = time.monotonic()
        executor = self._executor
        self._stats.preempted(len(plan.preempt))
        for name in plan.preempt:
            executor.set_aside(name)
        self._begin(plan.prefill)
        if plan.prefill and executor.nbytes > self._limit_bytes * TRIM_SHARE:
            executor.trim()  # the scheduler counts what the rows need, not what the arena still has from before
        executor.fit(self._limit_bytes - max(executor.nbytes, self._scheduler.promised_bytes(plan)))
        plan = replace(plan, prefill=tuple(chunk for chunk in plan.prefill if self._prefill(chunk)))
        batch = (*plan.rows, *(chunk.id for chunk in plan.prefill if chunk.last))
        drafts = plan.drafts and plan.drafts + ((),) * (len(batch) - len(plan.rows))
        failure: Exception | None = None
        try:
            if batch:
                self._inflight = executor.decode(drafts, begun)
            if self._inflight is not None and not (ahead is not None and self._model.on_cpu):
                executor.launch(self._inflight)
        except Exception as error:  # noqa: BLE001 - model code raises what it likes; one request pays, _recover logs
            failure = error
        for sequence in map(self._sequences.__getitem__, batch):
            if sequence.fault is not None:
                self._end(sequence.request.id, sequence.fault)
        self._scheduler.commit(plan)
        self._done += 1
        if failure is not None:
            self._recover(batch, failure, guessed=bool(drafts))
        elif ahead is not None:
            self._read(ahead)
            self._launch()
        elif not batch:
            self._stats.step(time.monotonic() - begun, 0, 0)

    def _launch(self) -> None:
        """Launch the step that was built meanwhile, unless reading the one ahead of it has ended it."""
        step = self._inflight
        if step is None or not step.waiting:
            return
        try:
            self._executor.launch(step)
        except Exception as error:  # noqa: BLE001 - model code raises what it likes; _recover logs it
            self._recover(step.rows, error)

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
            except GroupBroken:
                raise
            except Exception as error:  # model code raises what it likes; only this request needs what failed
                log.exception("restoring the prefix of request %s failed", chunk.id)
                self._end(chunk.id, error)
                continue
            if not there:
                refused.add(chunk.id)
            elif first:
                begun.append(Delta(chunk.id, [], prefix=sequence.report))
        if begun:
            self._outbox.send(Deltas(begun))

    def _prefill(self, chunk: PrefillChunk) -> bool:
        """Run one chunk, adopting the prompt after its last. False: it failed, and the client has been told."""
        sequence = self._sequences[chunk.id]
        if sequence.status is not Status.READING:  # an earlier chunk of this very step failed, or it was not begun
            return False
        started = time.monotonic()
        try:
            self._executor.prefill(chunk.id, chunk.start, chunk.end, chunk.last)
            self._speculator.chunk_read(sequence, chunk.end - chunk.start)
        except Exception as error:  # model code raises what it likes; only this request needs what failed
            self._alone_only(error)
            log.exception("prefill of request %s failed", chunk.id)
            self._end(chunk.id, error)
            return False
        self._stats.chunk(chunk)
        if chunk.end > chunk.start:
            elapsed = (time.monotonic() - started) * 1000
            self._costs.observe_prefill(chunk.start, chunk.end - chunk.start, elapsed)
        return True

    # --- results ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Read the step in flight, if any: afterwards rows may join and leave."""
        step, self._inflight = self._inflight, None
        if step is not None:
            self._read(step)

    def _read(self, step: InflightStep) -> None:
        try:
            self._executor.launch(step)
            drawn = step.drawn()
        except Exception as error:  # noqa: BLE001 - a lazy forward raises when it is evaluated; _recover logs it
            self._inflight = None
            self._recover(step.rows, error, guessed=bool(step.drafts))
            return
        now = time.monotonic()
        seconds = now - max(step.begun, self._last_read)
        milliseconds = (now - max(step.dispatched, self._last_read)) * 1000
        self._last_read = now
        deltas: list[Delta] = []
        held = [self._take(step, row, deltas) for row in drawn]
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
        for name in [name for name in step.rows if self._sequences[name].health is Health.SPOILT]:
            self._compute_again(name)

    def _take(self, step: InflightStep, drawn: Drawn, deltas: list[Delta]) -> int:
        """Commit what a row has drawn, as far as its answer goes, and tell it. Returns how many of the drawn tokens."""
        sequence = self._sequences[drawn.name]
        if drawn.bad or drawn.spoilt:
            sequence.not_finite(guessed=bool(step.drafts))
        if sequence.status is Status.ENDED:
            return 0
        self._scheduler.proven(drawn.name)
        if sequence.health is Health.SPOILT:
            return 0
        if sequence.poisoned:
            self._end(drawn.name, ArithmeticError("the model produced logits that are not finite"))
            return 0
        tokens: list[int] = []
        told: list[TokenLogprob] = []
        finish, count = None, 0
        while finish is None and count < len(drawn.tokens):
            try:
                logprob = self._logprob(step.picks, drawn.first + count, sequence)
                kept, finish = sequence.commit(drawn.tokens[count])
            except Exception as error:  # whatever it is, it is about this request alone
                log.exception("taking a token of request %s failed", drawn.name)
                self._end(drawn.name, error)
                return 0
            count += 1
            if kept:
                tokens.append(drawn.tokens[count - 1])
                told += [logprob] if logprob is not None else []
        right = min(len(tokens), drawn.agreed)
        verdict = Verdict(right, drawn.drafts - right) if drawn.drafts else None
        deltas.append(Delta(drawn.name, tokens, finish, told or None, verdict=verdict))
        self._scheduler.grew(drawn.name, count)
        if finish is not None:
            self._leave(drawn.name)
        return count

    def _logprob(self, picks: Picks, place: int, sequence: Sequence) -> TokenLogprob | None:
        asked = sequence.request.params.logprobs
        return None if asked is None else picks.logprobs_of(place, asked)

    # --- endings ----------------------------------------------------------------------------------------------

    def _end(self, name: str, why: Finish | Exception) -> None:
        """Tell the client that its request is over without a token, and let it go. An unknown name is already over."""
        sequence = self._sequences.get(name)
        if sequence is None or sequence.status is Status.ENDED:
            return
        if isinstance(why, Finish):
            self._outbox.send(Deltas([Delta(name, [], why)]))
        else:
            self._outbox.send(failure(name, why))
        self._leave(name)

    def _leave(self, name: str) -> None:
        self._sequences[name].end()
        self._leaving.append(name)

    def _free_leavers(self) -> None:
        """Give back everything that ended requests hold. Nothing may be in flight."""
        leaving, self._leaving = self._leaving, []
        for name in sorted(leaving, key=lambda name: not self._sequences[name].dirty):
            sequence = self._sequences[name]
            self._executor.depart(name)
            self._speculator.answer_done(sequence)
            self._scheduler.remove(name)

    def _compute_again(self, name: str) -> None:
        """A step with draft tokens left numbers in a row that are not finite, which plain decoding might never meet."""
        sequence = self._sequences[name]
        self._speculator.stop(name)
        if sequence.status is Status.ENDED:
            return  # its row is zeroed when it is freed
        log.warning("a step with draft tokens gave numbers that are not finite; request %s goes on without", name)
        self._executor.set_aside(name)
        self._scheduler.requeue(name, len(sequence.tokens), time.monotonic())

    def _recover(self, rows: tuple[str, ...], error: Exception, *, guessed: bool = False) -> None:
        """A decode step failed: rebuild the batch, and let the request that is to blame pay, not its neighbours.

        A lone row is to blame, and so is a row on probation. Otherwise nobody is known to be: all rows are recomputed
        and join again one by one, on probation until a step has succeeded with them. With draft tokens in it the step
        may have failed because of those: its rows go on without.
        """
        log.error("decode step with %d rows failed", len(rows), exc_info=error)
        self._stats.failed()
        with suppress(Exception):  # told already
            mx.synchronize()  # an earlier step may still be writing into the rows that are given up here
        suspects = [name for name in rows if name in self._scheduler.suspects]
        guilty = rows[0] if len(rows) == 1 else suspects[0] if len(suspects) == 1 else None
        if guessed:
            guilty = None
            self._speculator.failed(rows)
        self._inflight = None
        self._executor.rebuild()
        now = time.monotonic()
        for name in rows:
            sequence = self._sequences[name]
            self._scheduler.requeue(name, len(sequence.tokens), now, probation=guilty is None and not guessed)
            if name == guilty:
                self._end(name, error)

    def _alone_only(self, error: Exception) -> None:
        """Where there are other ranks nobody knows how far they have come: then nothing can go on."""
        if self._executor.ranks.several:
            raise GroupBroken(f"a forward failed on rank 0: {error}") from error

    # --- load -------------------------------------------------------------------------------------------------

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
