"""One request's dealings with the prefix cache, and what is told about them. Engine thread only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from millpond.prefix.loader import Load
from millpond.prefix.match import NOTHING, Match, RestorePlan
from millpond.prefix.records import BLOCK


class End(StrEnum):
    """Why a prompt's cached prefix ends where it does."""

    PROMPT = "prompt"
    """All of it was cached; the last token is always computed."""
    DIFFERS = "differs"
    """Nothing that is known goes on like this prompt."""
    EMPTY = "empty"
    """Nothing is cached for this model in this format."""
    EVICTED = "evicted"
    """What follows was cached and had to make room."""
    NOT_RESTORABLE = "not_restorable"
    """More is known, but some layer lacks its window or its snapshot there."""
    ANOTHER_RANK = "another_rank"
    """Rank 0 has more, but another rank of the group lacks it, or could not read it in time."""
    SLOWER = "slower"
    """More is on disk, but reading it is predicted to take longer than computing, or took longer."""
    DAMAGED = "damaged"
    """More was on disk, but could not be read."""
    MEMORY = "memory"
    """More is on disk, but cached blocks may not take as much memory as that needs."""
    SELFCHECK = "selfcheck"
    """Computed afresh on purpose, to compare."""
    UNWANTED = "unwanted"
    """What the model thinks of each token of the prompt was asked, so that all of it had to be computed."""
    OFF = "off"
    """This model or this server does not cache prefixes."""


@dataclass(frozen=True)
class Offer:
    """What the scheduler has to know of a waiting request."""

    position: int
    """Tokens that can be restored now."""
    wants: bytes | None
    """Key of the next block it has to compute: of several who want the same, one computes it."""
    held: bool
    """It waits for the disk."""


class PrefixQuery:
    """One request's dealings with the cache."""

    def __init__(self, match: Match) -> None:
        self.match = match
        self.load: Load | None = None
        self.loaded: set[bytes] = set()
        """Keys of blocks that were read from disk for it."""
        self.fetched_bytes = 0
        self.target: RestorePlan = NOTHING
        """What can be resumed when all that is being read has come."""
        self.refused: End | None = None
        """Why no more is read from disk for it."""
        self.check = False
        self.asked = False
        self.seen: tuple[int, Offer] | None = None
        """The last offer and the version of the cache it was true for."""
        self._last_key: bytes | None = None
        self.planned: dict[bool, tuple[int, RestorePlan]] = {}
        """The same for plans, without and with the disk."""

    @property
    def last_key(self) -> bytes:
        """Key of the block with which the prompt ends, its last token left out: equal prompts have equal ones."""
        if self._last_key is None:
            limit = self.match.limit
            self._last_key = self.match.chain.key(max(0, limit - 1) // BLOCK * BLOCK, limit)
        return self._last_key

    def cap(self, ceiling: int) -> None:
        """Nothing beyond this position is to be restored, until told otherwise."""
        if ceiling != self.match.ceiling:
            self.match.ceiling = ceiling
            self.seen = None
            self.planned.clear()

    def restart(self, tokens: Sequence[int]) -> None:
        """The request lost what was computed of it and begins again with all its ``tokens``."""
        self.match.restart(tokens)
        self.load = self.refused = self.seen = self._last_key = None
        self.planned.clear()
        self.fetched_bytes, self.target = 0, NOTHING
        self.check = False
