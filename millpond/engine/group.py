"""The ranks that run one model together, as one of them sees them; an engine without others is Alone."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import msgspec

from millpond.engine.orders import Begin, Offered, Order
from millpond.model.probe import Capabilities


class GroupBroken(Exception):  # noqa: N818 - reads as the fact it states
    """The ranks do not, or cannot, go on together."""


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank has found out about its share of the model, and what it can hold."""

    capabilities: Capabilities
    limit_bytes: int
    """Of keys and values."""
    layers: tuple[str, ...]
    """How it keeps them: must be the same everywhere."""


class Group(Protocol):
    """The first three methods are for the start and raise ModelError when the ranks cannot go together. The others are
    for rank 0, which decides, from then on; they may raise GroupBroken."""

    @property
    def rank(self) -> int:
        """Ours."""

    @property
    def world(self) -> int:
        """How many there are."""

    @property
    def neighbours(self) -> int:
        """How many of them share this machine, this one included; known after ``join``."""

    def join(self, content: str) -> mx.distributed.Group | None:
        """Meet the others, who must have the same model (``content`` is its digest); None: there are none."""

    def unanimous(self, vote: bool) -> bool:
        """Whether all of them say yes."""

    def settle(self, found: RankReport) -> RankReport:
        """What all of them can do."""

    def tell(self, order: Order) -> None:
        """Have the others do it too. Does not wait."""

    def restorable(self, order: Begin) -> int:
        """Tell them, and wait for what they say: the most that all of them can restore, up to ``order.position``."""

    def heard(self, offer: Offered) -> None:
        """One of them has said what it can restore."""

    def ceiling(self, name: str) -> tuple[int | None, bool]:
        """The most that they can restore of a waiting request, None for no limit, and whether one of them waits for
        its disk."""


class Alone:
    """A group of one."""

    rank = 0
    world = 1
    neighbours = 1

    def join(self, content: str) -> mx.distributed.Group | None:  # noqa: ARG002 - whatever it is
        return None

    def unanimous(self, vote: bool) -> bool:
        return vote

    def settle(self, found: RankReport) -> RankReport:
        return found

    def tell(self, order: Order) -> None:
        """Nobody listens."""

    def restorable(self, order: Begin) -> int:
        return order.position

    def heard(self, offer: Offered) -> None:
        raise ValueError(f"there is no rank {offer.rank}")

    def ceiling(self, name: str) -> tuple[int | None, bool]:  # noqa: ARG002 - nobody limits anything
        return None, False


ALONE = Alone()
