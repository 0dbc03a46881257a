"""The engine loop: take messages, plan a step, read prompts, draw tokens, tell the clients. One thread owns it all.

A decode step is dispatched before the one ahead of it has been read ("in flight"), which hides Python behind the
device. Rows join and leave only when nothing is in flight; a step whose draw depends on earlier tokens (penalties)
waits for them. Every request ends in exactly one place, ``_end``.
"""

from __future__ import annotations

import logging
import queue
import time
from contextlib import suppress
from dataclasses import dataclass

import mlx.core as mx
import msgspec
import numpy as np

from kvarn.engine.link import Inbox, Outbox
from kvarn.engine.prefixes import Cut, Prefixes
from kvarn.engine.refusals import failure, impossible
from kvarn.engine.sequence import Sequence
from kvarn.engine.tally import Tally
from kvarn.model.forwards import decode, prefill
from kvarn.model.load import LoadedModel
from kvarn.model.probe import Capabilities
from kvarn.prefix.disk.events import Found, Gone, Loaded, Opened, Saved
from kvarn.sample.sampler import BatchSampler, Picks
from kvarn.schedule.costs import CostModel
from kvarn.schedule.scheduler import NeverFits, Scheduler
from kvarn.types import Delta, ErrorKind, Finish, PrefillChunk, Request, StepPlan, TokenLogprob
from kvarn.wire import Beat, Cancel, Deltas, Explain, Explained, Failed, Start, Stop, Submit

log = logging.getLogger(__name__)

TRIM_SHARE = 0.5
"""Above this share of the memory limit, the arena is cut to what its rows need before more prompts are read."""
REST_SECONDS = 3.0
"""An engine without requests for this long gives its rows' memory back. The next ones often come sooner."""


@dataclass(frozen=True)
class Flight:
    """A dispatched decode step whose tokens have not been read yet."""

    rows: tuple[str, ...]
    picks: Picks
    cuts: list[Cut]
    """Blocks that the step fills."""
    context_tokens: int
    begun: float
    """When the execution of its plan began; seconds, monotonic."""
    dispatched: float


class Engine:
    """Runs requests from ``inbox`` until a Stop arrives; results go to ``outbox``."""

    def __init__(
        self,
        model: LoadedModel,
        capabilities: Capabilities,
        scheduler: Scheduler,
        costs: CostModel,
        limit_bytes: int,
        prefixes: Prefixes,
        inbox: Inbox,
        outbox: Outbox,
    ) -> None:
        self._model = model
        self._capabilities = capabilities
        self._scheduler = scheduler
        self._costs = costs
        self._limit_bytes = limit_bytes
        self._prefixes = prefixes
        self._inbox = inbox
        self._outbox = outbox
        self._lane = capabilities.lane(model, limit_bytes)
        self._sequences: dict[str, Sequence] = {}
        self._leaving: list[str] = []
        self._flight: Flight | None = None
        self._sampler: tuple[tuple[str, ...], BatchSampler] | None = None
        self._last_read = 0.0
        self._steps = 0
        self._tally = Tally()
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
        self._prefixes.offer(self._scheduler, self._sequences, now)
        plan = self._scheduler.plan(now)
        self._stalled = plan.empty and self._flight is None
        if self._flight is not None and not self._can_follow(self._flight, plan):
            self._settle()
        elif not plan.empty:
            self._execute(plan)
        self._report()

    def _receive(self) -> None:
        idle = self._flight is None and not self._leaving and (self._scheduler.idle or self._stalled)
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
                case Explain(name, tokens, salt):
                    self._outbox.send(Explained(name, self._prefixes.explain(tokens, salt)))
                case Stop():
                    self._stopping = True
                case Opened() | Found() | Loaded() | Saved() | Gone():
                    self._prefixes.on_event(message)
                case Start():
                    raise ValueError("a running engine cannot be started")

    def _patience(self) -> float | None:
        """How long to wait for a message when there is nothing else to do; None: for ever."""
        now = time.monotonic()
        if not self._scheduler.idle or self._lane.nbytes == 0:
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
        self._lane.trim()
        self._report()

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
        sequence = self._sequences[request.id] = Sequence(request)
        self._prefixes.arrive(sequence)

    # --- a step -----------------------------------------------------------------------------------------------

    def _can_follow(self, flight: Flight, plan: StepPlan) -> bool:
        """Whether ``plan`` may be dispatched while ``flight`` is unread: same rows, none about to end, none that still
        waits for its first token, which would come a step later."""
        return (
            self._capabilities.pipelined
            and plan.rows == flight.rows
            and not plan.prefill
            and not plan.preempt
            and not self._sampler_for(plan.rows).needs_history
            and not self._scheduler.suspects
            and all(self._sequences[name].told and self._sequences[name].remaining > 1 for name in plan.rows)
        )

    def _execute(self, plan: StepPlan) -> None:
        ahead, self._flight = self._flight, None
        begun = time.monotonic()
        self._tally.preempted(len(plan.preempt))
        rows = list(self._scheduler.rows)
        for name in plan.preempt:
            if name in rows:
                self._lane.release(rows.index(name))
                rows[rows.index(name)] = rows[-1]
                rows.pop()
            self._drop_prompt(self._sequences[name])
            self._prefixes.lost(self._sequences[name])
        self._begin(plan.prefill)
        if plan.prefill and self._held_bytes() > self._limit_bytes * TRIM_SHARE:
            self._lane.trim()  # the scheduler counts what the rows need, not what the arena still has from before
        self._prefixes.fit(self._limit_bytes - max(self._held_bytes(), self._scheduler.promised_bytes(plan)))
        plan = msgspec.structs.replace(plan, prefill=tuple(chunk for chunk in plan.prefill if self._prefill(chunk)))
        batch = (*plan.rows, *(chunk.id for chunk in plan.prefill if chunk.last))
        failure: Exception | None = None
        try:
            self._flight = self._dispatch(batch, ahead, begun) if batch else None
        except Exception as error:  # noqa: BLE001 - model code raises what it likes; one request pays, _recover logs
            failure = error
        self._scheduler.commit(plan)
        self._steps += 1
        if failure is not None:
            self._recover(batch, failure)
        elif ahead is not None:
            self._read(ahead)
        elif not batch:
            self._tally.step(time.monotonic() - begun, 0, 0)

    def _begin(self, chunks: tuple[PrefillChunk, ...]) -> None:
        """Give every prompt that starts in this step its cache, restored up to its first chunk."""
        begun = []
        for chunk in chunks:
            sequence = self._sequences[chunk.id]
            if sequence.prompt is None and not sequence.ended:
                try:
                    sequence.prompt = self._prefixes.begin(sequence, chunk.start, alone=not self._lane.lengths)
                except Exception as error:  # model code raises what it likes; only this request needs what failed
                    log.exception("restoring the prefix of request %s failed", chunk.id)
                    self._end(chunk.id, error)
                else:
                    if not sequence.begun:
                        sequence.begun = True
                        begun.append(Delta(chunk.id, [], prefix=sequence.report))
        if begun:
            self._outbox.send(Deltas(begun))

    def _prefill(self, chunk: PrefillChunk) -> bool:
        """Run one chunk, adopting the prompt after its last. False: it failed, and the client has been told."""
        sequence = self._sequences[chunk.id]
        if sequence.ended:  # an earlier chunk of this very step failed
            return False
        assert sequence.prompt is not None
        started = time.monotonic()
        try:
            prefill(self._model.network, sequence.prompt, sequence.tokens[chunk.start : chunk.end])
            self._prefixes.chunk_done(sequence, chunk.start, chunk.end)
            self._lane.reserve(len(sequence.tokens) - 1, chunk.end / len(sequence.tokens))
            if chunk.last:
                self._prefixes.prompt_done(sequence, chunk.end)
                self._lane.adopt(sequence.prompt)
                sequence.prompt = None
        except Exception as error:  # model code raises what it likes; only this request needs what failed
            log.exception("prefill of request %s failed", chunk.id)
            self._end(chunk.id, error)
            return False
        self._tally.chunk(chunk)
        if chunk.end > chunk.start:
            elapsed = (time.monotonic() - started) * 1000
            self._costs.observe_prefill(chunk.start, chunk.end - chunk.start, elapsed)
        return True

    def _dispatch(self, rows: tuple[str, ...], ahead: Flight | None, begun: float) -> Flight:
        sequences = [self._sequences[name] for name in rows]
        sampler = self._sampler_for(rows)
        context_tokens = sum(self._lane.lengths)
        dispatched = time.monotonic()
        if ahead is not None:
            tokens, unread = ahead.picks.tokens, 1
        else:
            tokens, unread = mx.array([sequence.tokens[-1] for sequence in sequences], dtype=mx.int32), 0
        logits = decode(self._model.network, self._lane, tokens)
        picks = sampler(
            logits,
            [len(sequence.tokens) + unread for sequence in sequences],
            [sequence.tokens for sequence in sequences] if sampler.needs_history else None,
            [sequence.prompt_length for sequence in sequences],
        )
        cuts = self._prefixes.cuts(rows, self._lane)
        mx.async_eval(*picks.arrays(), *self._lane.arrays(), *(array for cut in cuts for array in cut.arrays()))
        return Flight(rows, picks, cuts, context_tokens, begun, dispatched)

    def _sampler_for(self, rows: tuple[str, ...]) -> BatchSampler:
        if self._sampler is None or self._sampler[0] != rows:
            params = [self._sequences[name].request.params for name in rows]
            self._sampler = (rows, BatchSampler(params, self._model.vocab_size))
        return self._sampler[1]

    # --- results ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Read the step in flight, if any: afterwards rows may join and leave."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._read(flight)

    def _read(self, flight: Flight) -> None:
        try:
            mx.eval(flight.picks.arrays())
        except Exception as error:  # noqa: BLE001 - a lazy forward raises when it is evaluated; _recover logs it
            self._flight = None
            self._recover(flight.rows, error)
            return
        now = time.monotonic()
        seconds = now - max(flight.begun, self._last_read)
        milliseconds = (now - max(flight.dispatched, self._last_read)) * 1000
        self._last_read = now
        self._costs.observe_decode(len(flight.rows), flight.context_tokens, milliseconds)
        tokens, bad = np.array(flight.picks.tokens).tolist(), np.array(flight.picks.bad).tolist()
        deltas = []
        for row, name in enumerate(flight.rows):
            sequence = self._sequences[name]
            sequence.poisoned = sequence.poisoned or bad[row]
            if sequence.ended:
                continue
            self._scheduler.proven(name)
            if bad[row]:
                self._end(name, ArithmeticError("the model produced logits that are not finite"))
                continue
            try:
                logprob = self._logprob(flight.picks, row, sequence)
            except Exception as error:  # whatever it is, it is about this request alone
                log.exception("log-probabilities of request %s failed", name)
                self._end(name, error)
                continue
            kept, finish = sequence.commit(tokens[row])
            told = [logprob] if kept and logprob is not None else None
            deltas.append(Delta(name, [tokens[row]] if kept else [], finish, told))
            sequence.told = True
            if finish is not None:
                self._leave(name)
        if deltas:
            self._outbox.send(Deltas(deltas))
        self._tally.step(seconds, len(flight.rows), len(deltas))
        self._prefixes.step_read(flight.cuts, self._sequences, self._lane)

    def _logprob(self, picks: Picks, row: int, sequence: Sequence) -> TokenLogprob | None:
        asked = sequence.request.params.logprobs
        return None if asked is None else picks.logprobs_of(row, asked)

    # --- endings ----------------------------------------------------------------------------------------------

    def _end(self, name: str, why: Finish | Exception) -> None:
        """Tell the client that its request is over without a token, and let it go. An unknown name is already over."""
        sequence = self._sequences.get(name)
        if sequence is None or sequence.ended:
            return
        if isinstance(why, Finish):
            self._outbox.send(Deltas([Delta(name, [], why)]))
        else:
            self._outbox.send(failure(name, why))
        self._leave(name)

    def _leave(self, name: str) -> None:
        self._sequences[name].ended = True
        self._leaving.append(name)

    def _free_leavers(self) -> None:
        """Give back everything that ended requests hold. Nothing may be in flight."""
        leaving, self._leaving = self._leaving, []
        for name in leaving:
            sequence = self._sequences.pop(name)
            self._drop_prompt(sequence)
            if name in self._scheduler.rows:
                row = self._scheduler.rows.index(name)
                self._prefixes.answer_done(sequence, self._lane, row)
                self._lane.release(row, scrub=sequence.poisoned)
            self._scheduler.remove(name)

    def _drop_prompt(self, sequence: Sequence) -> None:
        """Give up what has been read of a prompt that has no row yet, and the room that was made for it."""
        if sequence.prompt is not None:
            sequence.prompt = None
            self._lane.unreserve()

    def _recover(self, rows: tuple[str, ...], error: Exception) -> None:
        """A decode step failed: rebuild the batch, and let the request that is to blame pay, not its neighbours.

        A lone row is to blame, and so is a row on probation. Otherwise nobody is known to be: all rows are recomputed
        and join again one by one, on probation until a step has succeeded with them.
        """
        log.error("decode step with %d rows failed", len(rows), exc_info=error)
        self._tally.failed()
        with suppress(Exception):  # told already
            mx.synchronize()  # an earlier step may still be writing into the rows that are given up here
        suspects = [name for name in rows if name in self._scheduler.suspects]
        guilty = rows[0] if len(rows) == 1 else suspects[0] if len(suspects) == 1 else None
        self._flight = self._sampler = None
        self._lane = self._capabilities.lane(self._model, self._limit_bytes)
        now = time.monotonic()
        for name in rows:
            sequence = self._sequences[name]
            self._scheduler.requeue(name, len(sequence.tokens), now, probation=guilty is None)
            self._prefixes.lost(sequence)
            if name == guilty:
                self._end(name, error)

    # --- load -------------------------------------------------------------------------------------------------

    def _held_bytes(self) -> int:
        return self._lane.nbytes + sum(s.prompt.nbytes for s in self._sequences.values() if s.prompt is not None)

    def _report(self) -> None:
        self._outbox.report(
            Beat(
                step=self._steps,
                running=self._scheduler.running,
                waiting=self._scheduler.waiting,
                kv_bytes=self._held_bytes(),
                wait_seconds=self._scheduler.wait_seconds(),
                counters=self._tally.counters(),
                prefix=self._prefixes.load(),
            )
        )
