"""The engine's side of speculative decoding: who guesses for which row, and how much. Engine thread only.

Where guesses come from is in millpond/speculate; inflight.py says what is made of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass, field

from millpond.engine.inflight import Drawn
from millpond.engine.sequence import Sequence
from millpond.speculate.controller import DRAFT_MODEL, Controller, Offer, source_of
from millpond.speculate.draft import Draft
from millpond.speculate.lookup import Lookup, PastOutputs
from millpond.speculate.ngrams import SEPARATOR, Ngrams
from millpond.types import GRID, SpecCounters, SpecMode, SpecSettings

log = logging.getLogger(__name__)

Sequences = Mapping[str, Sequence]


MOST_FAILURES = 3
"""Failures, of the draft model or of steps with draft tokens, after which there are no more of them."""
PREDICTED = 4, 1024
"""Of a prediction so many times the longest answer is used, and so many tokens more: what is beyond cannot come."""


@dataclass
class _Guesser:
    """What guesses for one request."""

    most: int
    adaptive: bool
    modelled: bool
    """The draft model guesses."""
    lookup: Lookup | None = None
    """Made when it is first asked: a long text takes milliseconds."""


class Speculator:
    """What the engine loop calls. Without modes nothing is guessed and every method does the plain thing."""

    def __init__(
        self,
        settings: SpecSettings,
        modes: Many[SpecMode],
        most: int,
        vocab_size: int,
        controller: Controller,
        draft: Draft | None = None,
    ) -> None:
        """``modes``: those that requests can have. ``most``: draft tokens per row and step unless told otherwise.

        ``vocab_size``: ids from there on are never guessed.
        """
        self._default = settings.default
        self._modes = set(modes)
        self._most = settings.default.tokens or most
        self._vocab_size = vocab_size
        self._controller = controller
        self._draft = draft
        self._past = PastOutputs() if settings.shared else None
        self._guessers: dict[str, _Guesser] = {}
        self._taken: dict[str, Offer] = {}
        """What the step under way verifies."""
        self._draft_ms = 0.0
        """How long the draft model took for it."""
        self._waited = False
        """The step in flight was waited for in order to guess."""
        self._failures = 0
        self._counts = _Counts()

    @property
    def nbytes(self) -> int:
        """Bytes of the draft model's keys and values."""
        return self._draft.nbytes if self._draft is not None else 0

    # --- requests come and go ---------------------------------------------------------------------------------

    def arrive(self, sequence: Sequence) -> None:
        """A new request."""
        request = sequence.request
        asked = request.speculation or self._default
        if asked.mode not in self._modes:
            return
        most, modelled = min(asked.tokens or self._most, self._most), asked.mode is SpecMode.DRAFT
        with self._alone(request.id):
            self._guessers[request.id] = _Guesser(most, asked.adaptive, modelled)
            if modelled and self._draft is not None:
                self._draft.begin(request.id, sequence.tokens, request.params, request.cache_salt)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """What is about one request and raises costs that one's guesses, and nothing else."""
        try:
            yield
        except Exception:  # whatever it is, no answer needs it
            log.exception("guessing for request %s failed; it goes on without", name)
            self.stop(name)

    @contextmanager
    def _together(self, rows: Many[str]) -> Iterator[None]:
        """What is about all rows of a step and raises costs their guesses, and nothing else."""
        try:
            yield
        except Exception:  # whatever it is, no answer needs it
            log.exception("guessing for %d requests failed; they go on without", len(rows))
            self.failed(rows)

    def stop(self, name: str) -> None:
        """Nothing more is guessed for a request."""
        guesser = self._guessers.pop(name, None)
        self._controller.forget(name)
        if guesser is not None and guesser.modelled and self._draft is not None:
            self._draft.end(name)

    def failed(self, names: Many[str]) -> None:
        """A step with draft tokens failed, or making them: its rows go on without, and after a few such all do."""
        for name in names:
            self.stop(name)
        self._failures += 1
        if self._failures == MOST_FAILURES:
            log.error("draft tokens failed %d times; tokens are guessed no more", MOST_FAILURES)
            self._modes.clear()

    def answer_done(self, sequence: Sequence) -> None:
        """A request leaves; others may guess from its answer."""
        self.stop(sequence.request.id)
        answer = sequence.tokens[sequence.prompt_length :]
        if self._past is not None and answer and not sequence.poisoned:
            with self._alone(sequence.request.id):
                self._past.add(sequence.request.cache_salt, answer)

    def chunk_read(self, sequence: Sequence, tokens: int) -> None:
        """So many tokens of a prompt have been read: the draft model reads on, too."""
        guesser = self._guessers.get(sequence.request.id)
        if guesser is not None and guesser.modelled:
            with self._alone(sequence.request.id):
                self._read(sequence, guesser, max(GRID, tokens))

    def rest(self) -> None:
        """There are no requests: give back what memory they have left behind."""
        if self._draft is not None:
            self._draft.trim()

    # --- guessing ---------------------------------------------------------------------------------------------

    def wants(self, rows: Many[str], sequences: Sequences) -> bool:
        """Whether the step after the one in flight should have draft tokens, and so wait for that one's tokens."""
        self._waited, behind = False, None
        with self._together(rows):
            offers = self._offers(rows, sequences, unread=1)
            self._waited = bool(offers) and bool(self._wanted(offers, rows, len(rows), unread=1))
            behind = None if self._waited else self._behind(rows, sequences)
        return self._waited or behind is not None

    def drafts(self, rows: Many[str], sequences: Sequences, room: int, others: int) -> dict[str, list[int]]:
        """Draft tokens for some rows, at most ``room`` each; nothing at all for a plain step. Nothing is in flight.

        ``others``: rows that join in this step, and have none.
        """
        waited, self._waited = self._waited, False
        self._taken, found = {}, {}
        with self._together(rows):
            self._read_on(rows, sequences)
            offers = self._offers(rows, sequences, most=room)
            wanted = self._wanted(offers, rows, len(rows) + others) if offers else {}
            found = self._guessed(wanted, sequences)
            self._taken = {name: Offer(name, len(ids), offers[name].source) for name, ids in found.items() if ids}
        if waited and not self._taken:
            self._controller.waited()
        return {name: found[name] for name in self._taken}

    def _offers(self, rows: Many[str], sequences: Sequences, most: int = 1 << 30, unread: int = 0) -> dict[str, Offer]:
        """What could be had for each row, ``unread`` tokens from now."""
        found = {}
        for name in rows:
            guesser = self._guessers.get(name)
            count = min(guesser.most, most, sequences[name].remaining - 1 - unread) if guesser is not None else 0
            if guesser is None or count <= 0:
                continue
            with self._alone(name):
                offer = self._offer(guesser, sequences[name], count, unread)
                if offer is not None:
                    found[name] = offer
        return found

    def _offer(self, guesser: _Guesser, sequence: Sequence, most: int, unread: int) -> Offer | None:
        name = sequence.request.id
        if guesser.modelled:
            ready = self._draft is not None and self._draft.ready(name, sequence.tokens)
            return Offer(name, most, DRAFT_MODEL) if ready else None
        lookup = guesser.lookup = guesser.lookup or self._lookup(sequence)
        lookup.extend(sequence.tokens[len(lookup) :])
        proposal = lookup.propose(most + unread, self._shared(sequence))
        count = len(proposal.tokens) - unread
        return Offer(name, count, source_of(proposal.match)) if count > 0 else None

    def _lookup(self, sequence: Sequence) -> Lookup:
        times, more = PREDICTED
        prediction = sequence.request.prediction[: times * sequence.request.params.max_tokens + more]
        # A tokenizer may know ids that the model has no embedding for.
        return Lookup([token if 0 <= token < self._vocab_size else SEPARATOR for token in prediction])

    def _shared(self, sequence: Sequence) -> Ngrams | None:
        return self._past.of(sequence.request.cache_salt) if self._past is not None else None

    def _wanted(self, offers: Mapping[str, Offer], rows: Many[str], count: int, unread: int = 0) -> dict[str, int]:
        """How many draft tokens for whom, in a forward of ``count`` rows."""
        if self._forced(rows):
            return {name: offer.most for name, offer in offers.items()}
        depth = self._controller.choose(list(offers.values()), count, unread)
        if not depth:
            self._counts.fallbacks += 1
        return {name: min(offer.most, depth) for name, offer in offers.items() if depth}

    def _forced(self, rows: Many[str]) -> bool:
        """Whether as much is to be guessed as can be: all must have said so, for all wait for the longest row, unless
        the server is set up so."""
        guessers = [self._guessers.get(name) for name in rows]
        if not self._default.adaptive:
            return not any(guesser is not None and guesser.adaptive for guesser in guessers)
        return all(guesser is not None and not guesser.adaptive for guesser in guessers)

    def _guessed(self, wanted: Mapping[str, int], sequences: Sequences) -> dict[str, list[int]]:
        found, modelled = {}, {}
        for name, count in wanted.items():
            lookup = self._guessers[name].lookup
            if lookup is None:
                modelled[name] = count
            else:
                with self._alone(name):
                    found[name] = lookup.propose(count, self._shared(sequences[name])).tokens
        self._draft_ms = 0.0
        if modelled and self._draft is not None:
            begun = time.monotonic()
            everybody = {name: sequences[name].tokens for name, guesser in self._guessers.items() if guesser.modelled}
            try:
                found |= self._draft.propose(modelled, everybody)
            except Exception:  # noqa: BLE001 - model code raises what it likes; _draft_failed logs it
                self._draft_failed()
            self._draft_ms = (time.monotonic() - begun) * 1000
        return found

    # --- the draft model --------------------------------------------------------------------------------------

    def _behind(self, rows: Many[str], sequences: Sequences) -> str | None:
        """A row that the draft model should read on for."""
        if self._draft is None:
            return None
        for name in rows:
            guesser = self._guessers.get(name)
            if guesser is None or not guesser.modelled:
                continue
            ready = True
            with self._alone(name):
                ready = self._draft.ready(name, sequences[name].tokens)
            if not ready:
                may = not guesser.adaptive or self._controller.may_read(guesser.most)
                return name if may else None
        return None

    def _read_on(self, rows: Many[str], sequences: Sequences) -> None:
        """Let the draft model read on for one row, not to keep the others waiting for long; what cannot be read is
        given up, for those behind it."""
        name, draft = self._behind(rows, sequences), self._draft
        if name is None or draft is None:
            return
        self._read(sequences[name], self._guessers[name], GRID)
        if name in self._guessers and not draft.reads(name):
            self.stop(name)

    def _read(self, sequence: Sequence, guesser: _Guesser, most: int) -> None:
        if self._draft is None or (guesser.adaptive and not self._controller.may_read(guesser.most)):
            return
        begun = time.monotonic()
        try:
            self._draft.read(sequence.request.id, sequence.tokens, most)
        except Exception:  # noqa: BLE001 - model code raises what it likes; _draft_failed logs it
            self._draft_failed()
        self._controller.may_read(guesser.most, (time.monotonic() - begun) * 1000)

    def _draft_failed(self) -> None:
        """The draft model has cleared itself; after a few times it is not asked again."""
        log.exception("the draft model failed")
        self._failures += 1
        if self._failures == MOST_FAILURES:
            log.error("the draft model guesses no more")
            self._draft = None
            self._modes.discard(SpecMode.DRAFT)
            self._guessers = {name: guesser for name, guesser in self._guessers.items() if not guesser.modelled}

    # --- results ----------------------------------------------------------------------------------------------

    def plain(self) -> None:
        """A step without draft tokens has been read."""
        self._controller.plain()
        self._counts.depth = 0.0

    def verified(self, drawn: Many[Drawn], kept: Many[int], context_tokens: int, milliseconds: float) -> None:
        """A step with draft tokens has been read. ``kept``: how many of each row's tokens its answer took, 0 for rows
        that were over. ``milliseconds``: of the forward, over ``context_tokens`` keys."""
        with self._together([row.name for row in drawn]):
            rows = [(row, count) for row, count in zip(drawn, kept, strict=True) if row.drafts and count]
            results = {self._taken[row.name]: row.agreed for row, _ in rows}
            forced = self._forced([row.name for row in drawn])
            self._controller.verified(
                results, sum(kept), len(drawn), context_tokens, milliseconds, self._draft_ms, charged=not forced
            )
            self._counts.verified(rows, len(drawn))

    def slowdown(self, rows: int, columns: int) -> float:
        """How many times as long as a plain one a step of so many columns takes."""
        return self._controller.pace.factor(rows, columns)

    def counters(self) -> SpecCounters:
        """What has been done so far."""
        return self._counts.frozen()


@dataclass
class _Counts:
    """SpecCounters in the making."""

    steps: int = 0
    rows: int = 0
    proposed: int = 0
    accepted: int = 0
    bonus: int = 0
    drawn: int = 0
    fallbacks: int = 0
    depth: float = 0.0
    proposed_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def verified(self, rows: Many[tuple[Drawn, int]], all_rows: int) -> None:
        self.steps += 1
        self.rows += len(rows)
        self.depth = sum(row.drafts for row, _ in rows) / all_rows
        for row, kept in rows:
            agreed = min(row.agreed, kept)
            self.proposed += row.drafts
            self.accepted += agreed
            self.bonus += kept > row.drafts
            self.drawn += kept
            more = row.drafts - len(self.proposed_at)
            self.proposed_at += [0] * more
            self.accepted_at += [0] * more
            for place in range(row.drafts):
                self.proposed_at[place] += 1
                self.accepted_at[place] += place < agreed

    def frozen(self) -> SpecCounters:
        return SpecCounters(
            steps=self.steps,
            rows=self.rows,
            proposed=self.proposed,
            accepted=self.accepted,
            bonus=self.bonus,
            drawn=self.drawn,
            fallbacks=self.fallbacks,
            depth=self.depth,
            proposed_at=tuple(self.proposed_at),
            accepted_at=tuple(self.accepted_at),
        )
