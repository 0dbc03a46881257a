"""The engine's side of speculative decoding: who has draft tokens, and how many. Engine thread only.

Where they come from is in millpond/speculate; inflight.py says what is made of them.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

from msgspec import structs

from millpond.engine.inflight import Drawn
from millpond.engine.sequence import Sequence
from millpond.speculate.controller import Controller
from millpond.speculate.proposer import DraftOffer, Proposer, Source
from millpond.types import GRID, SpecCounters, SpecMode, SpecSettings

log = logging.getLogger(__name__)

Sequences = Mapping[str, Sequence]
Asked = TypeVarTuple("Asked")
Found = TypeVar("Found")

FORCED = Source(SpecMode.NGRAM, first_chance=0.95)
"""Tokens that a grammar leaves no choice about: nearly none, as the same letters may be other tokens."""
MOST_FAILURES = 3
"""Failures, of a proposer or of steps with draft tokens, after which there are no more of them."""


@dataclass(slots=True)
class _Proposing:
    """A request that may have draft tokens."""

    mode: SpecMode
    proposer: Proposer
    most: int
    adaptive: bool


class Speculator:
    """What the engine loop calls. Without proposers there are no drafts and every method does the plain thing."""

    def __init__(
        self,
        settings: SpecSettings,
        proposers: Mapping[SpecMode, Proposer],
        most: int,
        controller: Controller,
        tile: int = 0,
    ) -> None:
        """``most``: draft tokens per row and step unless told otherwise. ``tile``: positions of a row that are packed
        together, which the next ones see so; 0 for none."""
        self._default = structs.replace(settings.default, mode=settings.default.mode.among(proposers))
        self._proposers = dict(proposers)
        self._most = settings.default.tokens or most
        self._tile = tile
        self._controller = controller
        self._requests: dict[str, _Proposing] = {}
        self._taken: dict[str, DraftOffer] = {}
        """What the step under way verifies."""
        self._proposing_ms: dict[SpecMode, float] = {}
        """How long those proposers took for it that do take time."""
        self._waited = False
        """The step in flight was waited for in order to propose."""
        self._failures = 0
        self._given_up = False
        """No further request has draft tokens."""
        self._counters = SpecCounters()

    @property
    def modes(self) -> list[SpecMode]:
        """Those that requests can have."""
        return list(self._proposers)

    @property
    def nbytes(self) -> int:
        """Bytes of the proposers' keys and values."""
        return sum(proposer.nbytes for proposer in self._proposers.values())

    # --- requests come and go ---------------------------------------------------------------------------------

    def arrive(self, sequence: Sequence) -> None:
        """A new request."""
        request = sequence.request
        asked = request.speculation or self._default
        proposer = self._proposers.get(asked.mode)
        if proposer is None or self._given_up:
            return
        most = min(asked.tokens or self._most, self._most)
        self._requests[request.id] = _Proposing(asked.mode, proposer, most, asked.adaptive)
        self._alone(request.id, proposer.begin, request)

    def _alone(self, name: str, ask: Callable[[*Asked], Found], *asked: *Asked) -> Found | None:
        """What is about one request and raises costs that one's draft tokens, and nothing else."""
        try:
            return ask(*asked)
        except Exception:  # whatever it is, no answer needs it
            log.exception("guessing for request %s failed; it goes on without", name)
            self.stop(name)
            return None

    @contextmanager
    def _together(self, rows: Many[str]) -> Iterator[None]:
        """What is about all rows of a step and raises costs their draft tokens, and nothing else."""
        try:
            yield
        except Exception:  # whatever it is, no answer needs it
            log.exception("guessing for %d requests failed; they go on without", len(rows))
            self.failed(rows)

    def stop(self, name: str) -> None:
        """A request has no more draft tokens."""
        request = self._requests.pop(name, None)
        self._controller.forget(name)
        if request is not None:
            request.proposer.end(name)

    def failed(self, names: Many[str]) -> None:
        """A step with draft tokens failed, or making them: its rows go on without, and after a few such all do."""
        for name in names:
            self.stop(name)
        self._failures += 1
        if self._failures == MOST_FAILURES:
            log.error("draft tokens failed %d times; tokens are guessed no more", MOST_FAILURES)
            self._given_up = True

    def answer_done(self, sequence: Sequence) -> None:
        """A request leaves; proposers may learn from its answer."""
        self.stop(sequence.request.id)
        answer = sequence.tokens[sequence.prompt_length :]
        if answer and not sequence.poisoned:
            for proposer in self._proposers.values():
                self._alone(sequence.request.id, proposer.answered, sequence.request.cache_salt, answer)

    def chunk_read(self, sequence: Sequence, tokens: int) -> None:
        """So many tokens of a prompt have been read: its proposer reads on, too."""
        request = self._requests.get(sequence.request.id)
        if request is not None:
            self._alone(sequence.request.id, self._read_along, sequence, request, tokens)

    def _read_along(self, sequence: Sequence, request: _Proposing, tokens: int) -> None:
        source = request.proposer.behind(sequence.request.id, sequence.tokens)
        if source is not None and self._may_read(request, source):
            self._read(sequence, request, source, max(GRID, tokens))

    def rest(self) -> None:
        """There are no requests: give back what memory they have left behind."""
        for proposer in self._proposers.values():
            proposer.trim()

    # --- proposing --------------------------------------------------------------------------------------------

    def wants(self, rows: Many[str], sequences: Sequences) -> bool:
        """Whether the step after the one in flight should have draft tokens, and so wait for that one's tokens."""
        self._waited, behind = False, None
        with self._together(rows):
            offers = self._offers(rows, sequences, unread=1)
            self._waited = bool(offers) and bool(self._wanted(offers, rows, len(rows), unread=1))
            behind = None if self._waited else self._behind(rows, sequences)
        return self._waited or behind is not None

    def drafts(
        self, rows: Many[str], sequences: Sequences, room: int, others: int, *, reading: bool = False
    ) -> dict[str, list[int]]:
        """Draft tokens for some rows, at most ``room`` each; nothing at all for a plain step. Nothing is in flight.

        ``others``: rows that join in this step, and have none. ``reading``: prompts are read in it, too.
        """
        waited, self._waited = self._waited, False
        self._taken = {}
        found: dict[str, list[int]] = {}
        with self._together(rows):
            self._read_on(rows, sequences)
            offers = self._offers(rows, sequences, most=room)
            wanted = self._wanted(offers, rows, len(rows) + others, reading=reading) if offers else {}
            found = self._proposed(wanted, offers, sequences)
            found = {name: self._admitted(sequences[name], ids) for name, ids in found.items()}
            self._taken = {name: DraftOffer(name, len(ids), offers[name].source) for name, ids in found.items() if ids}
        if waited and not self._taken:
            self._controller.waited()
        return {name: found[name] for name in self._taken}

    def _offers(
        self, rows: Many[str], sequences: Sequences, most: int = 1 << 30, unread: int = 0
    ) -> dict[str, DraftOffer]:
        """What could be had for each row, ``unread`` tokens from now."""
        found = {}
        for name in rows:
            request = self._requests.get(name)
            if request is None:
                continue
            sequence = sequences[name]
            count = min(request.most, most, sequence.remaining - 1 - unread, self._of_tile(sequence, unread))
            if count <= 0:
                continue
            forced = self._alone(name, sequence.sampling.forced) or []
            coming = forced[unread : unread + count]
            offer = DraftOffer(name, len(coming), FORCED, coming) if coming else None
            if offer is None and name in self._requests:
                offer = self._alone(name, request.proposer.offer, name, sequence.tokens, count, unread)
            if offer is not None:
                found[name] = offer
        return found

    def _of_tile(self, sequence: Sequence, unread: int) -> int:
        """Draft tokens that fill its row's last tile at most: decoded alone, those behind it would see it packed."""
        held = len(sequence.tokens) - 1 + unread
        return self._tile - 1 - held % self._tile if self._tile else self._most

    def _admitted(self, sequence: Sequence, draft: list[int]) -> list[int]:
        """Those of them that could be drawn: a grammar needs no forward to refuse the others."""
        return draft[: self._alone(sequence.request.id, sequence.sampling.admitted, draft) or 0]

    def _wanted(
        self, offers: Mapping[str, DraftOffer], rows: Many[str], count: int, unread: int = 0, *, reading: bool = False
    ) -> dict[str, int]:
        """How many draft tokens for whom, in a forward of ``count`` rows."""
        if self._forced(rows):
            return {name: offer.most for name, offer in offers.items()}
        depth = self._controller.choose(list(offers.values()), count, unread, reading=reading)
        if not depth:
            self._counters = structs.replace(self._counters, fallbacks=self._counters.fallbacks + 1)
        return {name: min(offer.most, depth) for name, offer in offers.items() if depth}

    def _forced(self, rows: Many[str]) -> bool:
        """Whether as much is to be proposed as can be: all must have said so, for all wait for the longest row, unless
        the server is set up so."""
        requests = [self._requests.get(name) for name in rows]
        if not self._default.adaptive:
            return not any(request is not None and request.adaptive for request in requests)
        return all(request is not None and not request.adaptive for request in requests)

    def _proposed(
        self, wanted: Mapping[str, int], offers: Mapping[str, DraftOffer], sequences: Sequences
    ) -> dict[str, list[int]]:
        """The draft tokens themselves: those that came with their offers, and what proposers make of the others."""
        found = {name: list(offers[name].tokens[:count]) for name, count in wanted.items()}
        self._proposing_ms = {}
        missing = [name for name, tokens in found.items() if not tokens]
        for mode in dict.fromkeys(self._requests[name].mode for name in missing):
            begun = time.monotonic()
            asked = {name: wanted[name] for name in missing if self._requests[name].mode is mode}
            everybody = {name: sequences[name].tokens for name, one in self._requests.items() if one.mode is mode}
            try:
                found |= self._proposers[mode].propose(asked, everybody)
            except Exception:  # noqa: BLE001 - model code raises what it likes; _proposer_failed logs it
                self._proposer_failed(mode)
            self._proposing_ms[mode] = (time.monotonic() - begun) * 1000
        return found

    # --- proposers that read ----------------------------------------------------------------------------------

    def _behind(self, rows: Many[str], sequences: Sequences) -> tuple[str, Source] | None:
        """A row that its proposer should read on for."""
        for name in rows:
            request = self._requests.get(name)
            if request is None:
                continue
            source = self._alone(name, request.proposer.behind, name, sequences[name].tokens)
            if source is not None:
                return (name, source) if self._may_read(request, source) else None
        return None

    def _may_read(self, request: _Proposing, source: Source) -> bool:
        return not request.adaptive or self._controller.may_read(source, request.most)

    def _read_on(self, rows: Many[str], sequences: Sequences) -> None:
        """Let a proposer read on for one row, not to keep the others waiting for long; what cannot be read is given up,
        for those behind it."""
        behind = self._behind(rows, sequences)
        if behind is not None:
            name, source = behind
            if not self._read(sequences[name], self._requests[name], source, GRID):
                self.stop(name)

    def _read(self, sequence: Sequence, request: _Proposing, source: Source, most: int) -> bool:
        """Returns whether that leads to offers."""
        begun = time.monotonic()
        useful = False
        try:
            useful = request.proposer.read(sequence.request.id, sequence.tokens, most)
        except Exception:  # noqa: BLE001 - model code raises what it likes; _proposer_failed logs it
            self._proposer_failed(request.mode)
        self._controller.may_read(source, request.most, (time.monotonic() - begun) * 1000)
        return useful

    def _proposer_failed(self, mode: SpecMode) -> None:
        """It has cleared itself; after a few times it is not asked again."""
        log.exception("the proposer of mode %s failed", mode.value)
        self._failures += 1
        if self._failures == MOST_FAILURES:
            log.error("the proposer of mode %s is asked no more", mode.value)
            del self._proposers[mode]
            self._requests = {name: request for name, request in self._requests.items() if request.mode is not mode}

    # --- results ----------------------------------------------------------------------------------------------

    def plain(self) -> None:
        """A step without draft tokens has been read."""
        self._controller.plain()
        if self._counters.depth:
            self._counters = structs.replace(self._counters, depth=0.0)

    def verified(self, drawn: Many[Drawn], kept: Many[int], context_tokens: int, milliseconds: float) -> None:
        """A step with draft tokens has been read. ``kept``: how many of each row's tokens its answer took, 0 for rows
        that were over. ``milliseconds``: of the forward, over ``context_tokens`` keys."""
        with self._together([row.name for row in drawn]):
            rows = [(row, count) for row, count in zip(drawn, kept, strict=True) if row.drafts and count]
            results = {self._taken[row.name]: row.agreed for row, _ in rows}
            forced = self._forced([row.name for row in drawn])
            self._controller.verified(
                results, sum(kept), len(drawn), context_tokens, milliseconds, self._proposing_ms, charged=not forced
            )
            self._counters = _counted(self._counters, rows, len(drawn))

    def slowdown(self, rows: int, columns: int) -> float:
        """How many times as long as a plain one a step of so many columns takes."""
        return self._controller.pace.factor(rows, columns)

    def counters(self) -> SpecCounters:
        """What has been done so far."""
        return self._counters


def _counted(before: SpecCounters, rows: Many[tuple[Drawn, int]], all_rows: int) -> SpecCounters:
    """With one more step. ``rows``: those with draft tokens, and how many of its tokens each took."""
    drafts = [row.drafts for row, _ in rows]
    agreed = [min(row.agreed, kept) for row, kept in rows]
    places = max(drafts, default=0)
    return SpecCounters(
        steps=before.steps + 1,
        rows=before.rows + len(rows),
        proposed=before.proposed + sum(drafts),
        accepted=before.accepted + sum(agreed),
        bonus=before.bonus + sum(kept > row.drafts for row, kept in rows),
        drawn=before.drawn + sum(kept for _, kept in rows),
        fallbacks=before.fallbacks,
        proposed_at=_by_place(before.proposed_at, drafts, places),
        accepted_at=_by_place(before.accepted_at, agreed, places),
        depth=sum(drafts) / all_rows,
    )


def _by_place(before: tuple[int, ...], counts: Many[int], places: int) -> tuple[int, ...]:
    """With the first so many places of each row counted once more; at least ``places`` of them."""
    filled, rising = before + (0,) * (places - len(before)), sorted(counts)
    return tuple(seen + len(rising) - bisect_right(rising, place) for place, seen in enumerate(filled))
