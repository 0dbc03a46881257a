"""How many draft tokens are worth verifying, step by step.

Expected tokens per millisecond decide, from what was accepted of each row's drafts so far and from how long forwards of
more columns take. Expectations can be wrong, so a budget stands behind them: guessing that costs time empties it, plain
steps refill it at one per cent, and an empty one means plain decoding. That bounds the loss, whatever the text; what is
in the budget pays for trying again. Pure; engine thread only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from millpond.schedule.costs import CostModel
from millpond.speculate.pace import Pace

MARGIN = 1.03
"""Expected gain below which guessing is not worth its risk."""
REFILL = 0.01
"""Share of the plain steps' time that may be lost."""
BUDGET, FIRST_BUDGET = 3.0, 1.5
"""Most, and at first, in the budget; in plain steps."""
PROBE_BUDGET = 1.0
PROBE_TOKENS = 2
"""Draft tokens of a step that is only to find out, and the least that the budget must hold for it."""
LEAST_BUDGET = -2.0
"""No debt grows beyond this: estimates that were as wrong as that have been corrected by it."""

WAIT = 0.05
"""What waiting in vain takes out of the budget."""

LENGTHS = (2, 3, 4, 6, 9, 17)
"""Matches are sorted by how many tokens agree before the draft: a long match is right more often than a short one."""
FIRST_CHANCES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
DRAFT_MODEL = len(FIRST_CHANCES)
FIRST_DRAFT_CHANCE = 0.6
SOURCE_WEIGHT = 3.0
"""Trials that what is known of a source counts for in a row's own chance."""
ROW_MEMORY, SOURCE_MEMORY = 0.8, 0.97
SLOW_START = 2
"""Draft tokens per trial seen at most, while little has been seen."""
GIVE_UP = 4
"""More columns are not looked at after so many that were no better."""


def source_of(match: int) -> int:
    """The kind of guess that a match of so many tokens gives."""
    return bisect_right(LENGTHS, match)


class Offer(NamedTuple):
    """Draft tokens that could be had for one row."""

    name: str
    most: int
    source: int
    """See ``source_of``; DRAFT_MODEL."""


@dataclass(slots=True)
class Chance:
    """How often a draft token behind accepted ones is accepted."""

    memory: float
    accepted: float = 0.0
    tried: float = 0.0

    def observe(self, accepted: int, proposed: int) -> None:
        self.accepted = self.accepted * self.memory + accepted
        self.tried = self.tried * self.memory + accepted + (accepted < proposed)

    def value(self, prior: float, weight: float) -> float:
        return (self.accepted + prior * weight) / (self.tried + weight)


@dataclass
class Controller:
    """One per engine; rows by name."""

    costs: CostModel
    pace: Pace
    draft_share: float = 0.0
    """Time of one draft token of the draft model for all rows, in plain steps; learnt."""
    _budget: float = FIRST_BUDGET
    _rows: dict[str, Chance] = field(default_factory=dict)
    _sources: list[Chance] = field(
        default_factory=lambda: [Chance(SOURCE_MEMORY) for _ in (*FIRST_CHANCES, FIRST_DRAFT_CHANCE)]
    )

    def forget(self, name: str) -> None:
        """A row has left."""
        self._rows.pop(name, None)

    def chance(self, offer: Offer) -> float:
        """That the next draft token is accepted, if those before it were."""
        first = FIRST_DRAFT_CHANCE if offer.source == DRAFT_MODEL else FIRST_CHANCES[offer.source]
        prior = self._sources[offer.source].value(first, SOURCE_WEIGHT)
        row = self._rows.get(offer.name)
        return prior if row is None else row.value(prior, SOURCE_WEIGHT)

    def choose(self, offers: Sequence[Offer], rows: int, unread: int = 0) -> int:
        """Draft tokens for each offer, at most; 0: a plain step pays more. ``rows``: all rows of the forward.

        ``unread``: tokens that must come as guessed before, or there will be nothing to verify.
        """
        if not offers or self._budget <= 0.0:
            return 0
        return self._best(offers, rows, unread) or self._probe(offers, rows)

    def may_read(self, most: int, read_ms: float = 0.0) -> bool:
        """Whether a draft model should read on, to propose up to ``most`` tokens: while its guesses are worth that, or
        now and then to find out. ``read_ms``: it just did, for so long."""
        if self._best([Offer("", most, DRAFT_MODEL)], 1):
            return self._budget > 0.0
        self._budget = max(LEAST_BUDGET, self._budget - read_ms / max(1.0, self.costs.decode_ms(1, 0)))
        return self._budget >= BUDGET

    def waited(self) -> None:
        """A step was waited for in order to guess, in vain: Python was not hidden behind the device."""
        self._budget = max(LEAST_BUDGET, self._budget - WAIT)

    def _best(self, offers: Sequence[Offer], rows: int, unread: int = 0) -> int:
        """By expectation alone."""
        chances = [(self.chance(offer), self._limit(offer)) for offer in offers]
        reach = [chance**unread for chance, _ in chances]
        tokens, best, best_count, worse = float(rows), MARGIN, 0, 0
        for count in range(1, max(limit for _, limit in chances) + 1):
            for place, (chance, limit) in enumerate(chances):
                if count <= limit:
                    reach[place] *= chance
                    tokens += reach[place]
            speed = tokens / rows / self._time(offers, rows, count)
            if speed > best:
                best, best_count, worse = speed, count, 0
            else:
                worse += 1
                if worse == GIVE_UP:
                    break
        return best_count

    def _limit(self, offer: Offer) -> int:
        row = self._rows.get(offer.name)
        tried = self._sources[offer.source].tried + (row.tried if row is not None else 0.0)
        return min(offer.most, int(SLOW_START * (1 + tried)))

    def _time(self, offers: Sequence[Offer], rows: int, count: int) -> float:
        """Of a step with ``count`` draft tokens, in plain steps."""
        drafted = any(offer.source == DRAFT_MODEL for offer in offers)
        return self.pace.factor(rows, count + 1) + (self.draft_share * count if drafted else 0.0)

    def _probe(self, offers: Sequence[Offer], rows: int) -> int:
        """A few draft tokens to find out whether it pays by now, if the budget allows that."""
        count = min(PROBE_TOKENS, max(offer.most for offer in offers))
        gained = sum(self.chance(offer) for offer in offers) / rows
        loss = self._time(offers, rows, count) - 1.0 - gained
        return count if self._budget >= max(PROBE_BUDGET, 2.0 * loss) else 0

    def plain(self) -> None:
        """A step without draft tokens is over."""
        self._budget = min(BUDGET, self._budget + REFILL)
        self.pace.plain()

    def verified(
        self,
        results: Mapping[Offer, int],
        drawn: int,
        rows: int,
        context_tokens: int,
        forward_ms: float,
        draft_ms: float,
        *,
        charged: bool = True,
    ) -> None:
        """A step is over that verified ``offer.most`` draft tokens of each offer and accepted so many of them.

        ``drawn``: tokens that all ``rows`` of the forward drew, over ``context_tokens`` keys. ``charged``: it was our
        choice, and the budget's.
        """
        columns = 1 + max((offer.most for offer in results), default=0)
        for offer, accepted in results.items():
            self._rows.setdefault(offer.name, Chance(ROW_MEMORY)).observe(accepted, offer.most)
            self._sources[offer.source].observe(accepted, offer.most)
        plain_ms = self.costs.decode_ms(rows, context_tokens)
        if plain_ms <= 0.0 or columns == 1:
            return
        self.pace.observe(rows, columns, forward_ms / plain_ms)
        if draft_ms > 0.0:
            self.draft_share += 0.2 * (min(draft_ms / plain_ms / (columns - 1), 1.0) - self.draft_share)
        if not charged:
            return
        # By what is known of such steps, not by this one's own time: when the machine pauses, drafts are not to blame.
        saved = drawn / rows - self.pace.factor(rows, columns) - (self.draft_share * (columns - 1) if draft_ms else 0.0)
        self._budget = min(BUDGET, max(LEAST_BUDGET, self._budget + saved))
