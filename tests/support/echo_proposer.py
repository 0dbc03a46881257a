"""Proposes that the latest tokens come once more: a row of dashes, a list of equal items."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice

from millpond.speculate.proposer import DraftOffer, Proposer, Source
from millpond.types import SpecMode

PERIOD = 4
SOURCE = Source(SpecMode.DRAFT, first_chance=0.2)


class EchoProposer(Proposer):
    """Keeps nothing: what it needs is in the tokens."""

    def offer(self, name: str, tokens: Sequence[int], most: int, unread: int) -> DraftOffer | None:
        coming = list(islice(cycle(tokens[-PERIOD:]), unread, unread + most))
        return DraftOffer(name, len(coming), SOURCE, coming)
