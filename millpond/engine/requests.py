"""What clients ask and are told: requests are taken in or refused, answered token by token, ended, and freed.

Engine thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from millpond.engine.executor import Executor
from millpond.engine.grammars import Compiled, Grammars
from millpond.engine.group import GroupBroken
from millpond.engine.inflight import Drawn, InflightStep
from millpond.engine.link import Outbox
from millpond.engine.sequence import Health, Status
from millpond.engine.speculation import Speculator
from millpond.grammar.check import GrammarError
from millpond.grammar.constraint import DeadEnd
from millpond.model.load import LoadedModel
from millpond.schedule.scheduler import NeverFits, Scheduler
from millpond.types import Delta, ErrorKind, Finish, Request, TokenLogprob, Verdict
from millpond.wire import Deltas, Explain, Explained, Failed

log = logging.getLogger(__name__)

NO_MEMORY = ("Unable to allocate", "bad_alloc", "out of memory", "Insufficient Memory")
"""How MLX says on its back ends that there is no more memory."""


class Requests:
    """A request comes by ``submit``, gets its tokens by ``take``, and ends there or by ``end``, once."""

    def __init__(
        self,
        model: LoadedModel,
        scheduler: Scheduler,
        executor: Executor,
        speculator: Speculator,
        grammars: Grammars,
        outbox: Outbox,
    ) -> None:
        self._model = model
        self._scheduler = scheduler
        self._executor = executor
        self._speculator = speculator
        self._grammars = grammars
        self._outbox = outbox
        self._compiling: dict[str, Request] = {}
        """Those whose grammar is being compiled, by id."""
        self._leaving: list[str] = []

    def submit(self, request: Request) -> None:
        """A client asks. What this model can never answer is refused; what needs a grammar that is yet to be compiled
        waits for that, and for nothing else."""
        if request.id in self._executor.sequences or request.id in self._compiling:
            raise ValueError(f"request id {request.id!r} is already in use")
        try:
            if not self._grammars.ready(request.grammar):
                self._compiling[request.id] = request
                return
        except GrammarError as error:
            self._refuse(request, f"grammar: {error}")
            return
        self._admit(request)

    def compiled(self, found: Compiled) -> None:
        """A grammar has been compiled, or is none."""
        self._grammars.keep(found)
        waiting = [r for r in self._compiling.values() if r.grammar is not None and r.grammar.text == found.text]
        for request in waiting:
            del self._compiling[request.id]
            if isinstance(found.matcher, GrammarError):
                self._refuse(request, f"grammar: {found.matcher}")
            else:
                self._admit(request)

    def close(self) -> None:
        """Nobody is served any more."""
        for name in list(self._compiling):
            self.end(name, Finish.CANCELLED)
        self._grammars.close()

    def _refuse(self, request: Request, why: str) -> None:
        self._outbox.send(Failed(request.id, ErrorKind.INVALID, why))

    def _admit(self, request: Request) -> None:
        wrong = _impossible(request, self._model)
        if not wrong:
            tokens, params = len(request.tokens), request.params
            try:
                self._scheduler.add(
                    request.id, tokens, params.max_tokens, request.priority, request.client, time.monotonic()
                )
            except NeverFits as error:
                wrong = str(error)
        if wrong:
            self._refuse(request, wrong)
            return
        try:
            sequence = self._executor.arrive(request, self._grammars.constraint(request.grammar))
        except GroupBroken:
            raise
        except Exception as error:  # whatever it is, it is about this request alone
            log.exception("request %s cannot be begun", request.id)
            self._scheduler.remove(request.id)
            self._outbox.send(failure(request.id, error))
            return
        self._speculator.arrive(sequence)

    def explain(self, asked: Explain) -> None:
        """Tell what the prefix cache would do for a prompt."""
        wrong = _unknown(asked.tokens, self._model)
        if wrong:
            self._outbox.send(Failed(asked.id, ErrorKind.INVALID, wrong))
            return
        try:
            self._outbox.send(Explained(asked.id, self._executor.prefixes.explain(asked.tokens, asked.cache_salt)))
        except Exception as error:  # whatever it is, it is about this request alone
            log.exception("explaining %s failed", asked.id)
            self._outbox.send(failure(asked.id, error))

    def take(self, step: InflightStep, drawn: Drawn, deltas: list[Delta]) -> int:
        """Commit what a row has drawn, as far as its answer goes, and put what the client gets of it into ``deltas``.
        Returns how many of the drawn tokens were taken."""
        sequence = self._executor.sequences[drawn.name]
        if drawn.bad or drawn.spoilt:
            sequence.not_finite(guessed=bool(step.drafts))
        if sequence.status is Status.ENDED:
            return 0
        self._scheduler.proven(drawn.name)
        if sequence.health is Health.SPOILT:
            return 0
        if sequence.poisoned:
            self.end(drawn.name, ArithmeticError("the model produced logits that are not finite"))
            return 0
        tokens: list[int] = []
        told: list[TokenLogprob] = []
        asked = sequence.request.params.logprobs
        finish, count = None, 0
        while finish is None and count < len(drawn.tokens):
            try:
                logprob = None if asked is None else step.picks.logprobs_of(drawn.first + count, asked)
                kept, finish = sequence.commit(drawn.tokens[count])
            except DeadEnd as error:
                log.warning("request %s cannot go on: %s", drawn.name, error)
                self.end(drawn.name, error)
                return 0
            except Exception as error:  # whatever it is, it is about this request alone
                log.exception("taking a token of request %s failed", drawn.name)
                self.end(drawn.name, error)
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
            self._ended(drawn.name)
        return count

    def pooled(self, name: str) -> None:
        """A prompt of which only a vector is wanted has been read. Raises ArithmeticError."""
        pooled = self._executor.sequences[name].pooled
        assert pooled is not None
        self._outbox.send(Deltas([Delta(name, [], Finish.STOP, embedding=pooled.vector())]))
        self._ended(name)

    def end(self, name: str, why: Finish | Exception) -> None:
        """Tell the client that its request is over without a token, and let it go. An unknown name is already over."""
        sequence = self._executor.sequences.get(name)
        compiling = self._compiling.pop(name, None) is not None
        if not compiling and (sequence is None or sequence.status is Status.ENDED):
            return
        if isinstance(why, Finish):
            self._outbox.send(Deltas([Delta(name, [], why)]))
        else:
            self._outbox.send(failure(name, why))
        if not compiling:
            self._ended(name)

    def _ended(self, name: str) -> None:
        self._executor.sequences[name].end()
        self._leaving.append(name)

    @property
    def leaving(self) -> bool:
        """Whether some have ended and still hold what they had."""
        return bool(self._leaving)

    def free(self) -> None:
        """Give back everything that ended requests hold. Nothing may be in flight."""
        leaving, self._leaving = self._leaving, []
        dirty = {name for name in leaving if self._executor.sequences[name].dirty}
        for some in (dirty, [name for name in leaving if name not in dirty]):  # see Arena.release
            for name in self._executor.batch.departures(some):
                self._speculator.answer_done(self._executor.depart(name))
                self._scheduler.remove(name)


def _impossible(request: Request, model: LoadedModel) -> str:
    """Why this model can never answer a request; empty when it can."""
    most = request.params.max_tokens
    if not request.tokens or most < 1:
        return "a request needs at least one prompt token and max_tokens of at least 1"
    if len(request.tokens) + most > model.context_length:
        return f"prompt and max_tokens exceed the context of {model.context_length} tokens"
    if request.pooled and isinstance(model.embedder, str):
        return f"this model makes no embeddings: {model.embedder}"
    return _unknown(request.tokens, model)


def _unknown(tokens: Sequence[int], model: LoadedModel) -> str:
    """Says that a prompt has tokens that this model has not; empty when it has none such."""
    if all(0 <= token < model.vocab_size for token in tokens):
        return ""
    return f"prompt has a token id outside 0..{model.vocab_size - 1}"


def failure(name: str, error: Exception) -> Failed:
    """What the client is told of an exception."""
    if isinstance(error, MemoryError) or any(word in str(error) for word in NO_MEMORY):
        return Failed(name, ErrorKind.UNAVAILABLE, "the machine is short of memory; try again later")
    if isinstance(error, DeadEnd):
        return Failed(name, ErrorKind.GRAMMAR, f"the answer cannot become what it has to look like: {error}")
    return Failed(name, ErrorKind.ENGINE, f"the engine could not go on with this request: {error}")
