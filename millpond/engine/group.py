"""The ranks that run one model together, as one of them sees them."""

from __future__ import annotations

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


class Group:
    """A group of one: an engine alone. ``millpond.parallel`` has those of several, a leader that decides and followers
    that only start up with it.

    The first three methods are for the start and raise ModelError when the ranks cannot go together. The others are for
    the rank that decides, from then on; they may raise GroupBroken.
    """

    rank = 0
    """Ours."""
    world = 1
    """How many there are."""
    neighbours = 1
    """How many of them share this machine, this one included; known after ``join``."""

    def join(self, content: str) -> mx.distributed.Group | None:  # noqa: ARG002 - whatever it is
        """Meet the others, who must have the same model (``content`` is its digest); None: there are none."""
        return None

    def unanimous(self, vote: bool) -> bool:
        """Whether all of them say yes."""
        return vote

    def settle(self, found: RankReport) -> RankReport:
        """What all of them can do."""
        return found

    def tell(self, order: Order) -> None:
        """Have the others do it too. Does not wait."""

    def restorable(self, order: Begin) -> int:
        """Tell them, and wait for what they say: the most that all of them can restore, up to ``order.position``."""
        return order.position

    def heard(self, offer: Offered) -> None:
        """One of them has said what it can restore."""
        raise ValueError(f"there is no rank {offer.rank}")

    def ceiling(self, name: str) -> tuple[int | None, bool]:  # noqa: ARG002 - nobody limits anything
        """The most that they can restore of a waiting request, None for no limit, and whether one of them waits for
        its disk."""
        return None, False


ALONE = Group()
