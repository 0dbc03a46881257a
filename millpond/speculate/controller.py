"""How many draft tokens are worth verifying, step by step.

Expected tokens per millisecond decide, from what was accepted of each row's drafts so far and from how long forwards of
more columns take. Expectations can be wrong, so a budget stands behind them: guessing that costs time empties it, plain
steps refill it at one per cent, and an empty one means plain decoding. That bounds the loss, whatever the text; what is
in the budget pays for trying again. Pure; engine thread only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from millpond.schedule.costs import CostModel
from millpond.speculate.pace import Pace
from millpond.speculate.proposer import DraftOffer, Source
from millpond.types import SpecMode

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

BESIDE_READING = 2.0
"""Times as long as a plain one may a forward take that verifies in a step which reads prompts: whoever waits for it has
waited for them, too."""
WAIT = 0.05
"""What waiting in vain takes out of the budget."""

SOURCE_WEIGHT = 3.0
"""Trials that what is known of a source counts for in a row's own chance."""
ROW_MEMORY, SOURCE_MEMORY = 0.8, 0.97
SLOW_START = 2
"""Draft tokens per trial seen at most, while little has been seen."""
GIVE_UP = 4
"""More columns are not looked at after so many that were no better."""


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
    shares: dict[SpecMode, float] = field(default_factory=dict)
    """Time in which one draft token is proposed for all rows, in plain steps, where that takes any; learnt."""
    _budget: float = FIRST_BUDGET
    _rows: dict[str, Chance] = field(default_factory=dict)
    _sources: dict[Source, Chance] = field(default_factory=lambda: defaultdict(lambda: Chance(SOURCE_MEMORY)))

    def forget(self, name: str) -> None:
        """A row has left."""
        self._rows.pop(name, None)

    def chance(self, offer: DraftOffer) -> float:
        """That the next draft token is accepted, if those before it were."""
        prior = self._sources[offer.source].value(offer.source.first_chance, SOURCE_WEIGHT)
        row = self._rows.get(offer.name)
        return prior if row is None else row.value(prior, SOURCE_WEIGHT)

    def choose(self, offers: Sequence[DraftOffer], rows: int, unread: int = 0, *, reading: bool = False) -> int:
        """Draft tokens for each offer, at most; 0: a plain step pays more. ``rows``: all rows of the forward.

        ``unread``: tokens that must come as guessed before, or there will be nothing to verify. ``reading``: the step
        reads prompts, too.
        """
        if not offers or self._budget <= 0.0:
            return 0
        most = BESIDE_READING if reading else math.inf
        return self._best(offers, rows, unread, most) or (0 if reading else self._probe(offers, rows))

    def may_read(self, source: Source, most: int, read_ms: float = 0.0) -> bool:
        """Whether a proposer should read on, to offer up to ``most`` tokens: while they are worth that, or now and then
        to find out. ``read_ms``: it just did, for so long."""
        if self._best([DraftOffer("", most, source)], 1):
            return self._budget > 0.0
        self._budget = max(LEAST_BUDGET, self._budget - read_ms / max(1.0, self.costs.decode_ms(1, 0)))
        return self._budget >= BUDGET

    def waited(self) -> None:
        """A step was waited for in order to guess, in vain: Python was not hidden behind the device."""
        self._budget = max(LEAST_BUDGET, self._budget - WAIT)

    def _best(self, offers: Sequence[DraftOffer], rows: int, unread: int = 0, most: float = math.inf) -> int:
        """By expectation alone, among forwards that take at most ``most`` times as long as a plain one."""
        chances = [(self.chance(offer), self._limit(offer)) for offer in offers]
        reach = [chance**unread for chance, _ in chances]
        share = self._share(offer.source.mode for offer in offers)
        tokens, best, best_count, worse = float(rows), MARGIN, 0, 0
        for count in range(1, max(limit for _, limit in chances) + 1):
            for place, (chance, limit) in enumerate(chances):
                if count <= limit:
                    reach[place] *= chance
                    tokens += reach[place]
            slower = self.pace.factor(rows, count + 1)
            if slower > most:
                break
            speed = tokens / rows / (slower + share * count)
            if speed > best:
                best, best_count, worse = speed, count, 0
            else:
                worse += 1
                if worse == GIVE_UP:
                    break
        return best_count

    def _limit(self, offer: DraftOffer) -> int:
        row = self._rows.get(offer.name)
        tried = self._sources[offer.source].tried + (row.tried if row is not None else 0.0)
        return min(offer.most, int(SLOW_START * (1 + tried)))

    def _share(self, modes: Iterable[SpecMode]) -> float:
        """Time in which all of these propose one draft token, in plain steps."""
        return sum(self.shares.get(mode, 0.0) for mode in set(modes))

    def _probe(self, offers: Sequence[DraftOffer], rows: int) -> int:
        """A few draft tokens to find out whether it pays by now, if the budget allows that."""
        count = min(PROBE_TOKENS, max(offer.most for offer in offers))
        gained = sum(self.chance(offer) for offer in offers) / rows
        share = self._share(offer.source.mode for offer in offers)
        loss = self.pace.factor(rows, count + 1) + share * count - 1.0 - gained
        return count if self._budget >= max(PROBE_BUDGET, 2.0 * loss) else 0

    def plain(self) -> None:
        """A step without draft tokens is over."""
        self._budget = min(BUDGET, self._budget + REFILL)
        self.pace.plain()

    def verified(
        self,
        results: Mapping[DraftOffer, int],
        drawn: int,
        rows: int,
        context_tokens: int,
        forward_ms: float,
        proposing_ms: Mapping[SpecMode, float],
        *,
        charged: bool = True,
    ) -> None:
        """A step is over that verified ``offer.most`` draft tokens of each offer and accepted so many of them.

        ``drawn``: tokens that all ``rows`` of the forward drew, over ``context_tokens`` keys. ``proposing_ms``: what
        those proposers took that take time. ``charged``: it was our choice, and the budget's.
        """
        columns = 1 + max((offer.most for offer in results), default=0)
        for offer, accepted in results.items():
            self._rows.setdefault(offer.name, Chance(ROW_MEMORY)).observe(accepted, offer.most)
            self._sources[offer.source].observe(accepted, offer.most)
        plain_ms = self.costs.decode_ms(rows, context_tokens)
        if plain_ms <= 0.0 or columns == 1:
            return
        self.pace.observe(rows, columns, forward_ms / plain_ms)
        for mode, milliseconds in proposing_ms.items():
            share = self.shares.get(mode, 0.0)
            self.shares[mode] = share + 0.2 * (min(milliseconds / plain_ms / (columns - 1), 1.0) - share)
        if not charged:
            return
        # By what is known of such steps, not by this one's own time: when the machine pauses, drafts are not to blame.
        saved = drawn / rows - self.pace.factor(rows, columns) - self._share(proposing_ms) * (columns - 1)
        self._budget = min(BUDGET, max(LEAST_BUDGET, self._budget + saved))
