"""What a step does to rows, prompts and blocks, as data: what the leader of a group tells the other ranks.

Everything that decides a shape or a token is in here, so that the ranks cannot differ. Plain data: no mlx.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from millpond.types import Request


class Arrive(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A request waits from now on."""

    request: Request


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Give a prompt its caches, with ``position`` of its tokens restored."""

    name: str
    position: int
    check: bool = False
    """Nothing is restored on purpose: what is computed is compared with what is cached."""


class Prefill(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute tokens [start, end) of a prompt; after the ``last`` chunk it gets the next row."""

    name: str
    start: int
    end: int
    last: bool


class SetAside(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A request loses its row or its begun prompt, and waits again."""

    name: str
    scrub: bool = False


class Depart(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A request is over: what it holds is given back. ``poisoned``: nothing of it may be kept."""

    name: str
    scrub: bool = False
    poisoned: bool = False


class Decode(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One forward over all rows. ``drafts``: of each row, or none at all. ``behind``: one is still unread."""

    drafts: tuple[tuple[int, ...], ...]
    behind: bool
    state: int
    """Digest of the rows, their lengths and newest tokens before it; see executor.py."""


class Launch(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Start the computation of the newest forward."""


class Took(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The oldest unread forward drew these tokens for each row, and this many of them were taken."""

    tokens: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    poisoned: tuple[str, ...] = ()


class Fit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Keep at most so many bytes of cached blocks."""

    room_bytes: int


class Trim(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Give back memory that the rows do not need."""


class Trial(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Before the first request: one forward of so many tokens in one row, to see how long it takes."""

    tokens: int


class Close(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Save what an orderly stop should keep, and go."""


Order = Arrive | Begin | Prefill | SetAside | Depart | Decode | Launch | Took | Fit | Trim | Trial | Close


class Offered(msgspec.Struct, frozen=True, tag=True):
    """What a rank can restore of a waiting request now; ``held``: more is being read from its disk."""

    rank: int
    name: str
    position: int
    held: bool


class GroupBroken(Exception):  # noqa: N818 - reads as the fact it states
    """The ranks do not, or cannot, go on together."""


class Ranks(Protocol):
    """The other ranks, as the rank that decides sees them. Every method may raise GroupBroken."""

    @property
    def several(self) -> bool:
        """Whether there are any."""

    def tell(self, order: Order) -> None:
        """Have them do it too. Does not wait."""

    def restorable(self, order: Begin) -> int:
        """Tell them, and wait for what they say: the most that all of them can restore, up to ``order.position``."""

    def heard(self, offer: Offered) -> None:
        """One of them has said what it can restore."""

    def ceiling(self, name: str) -> tuple[int | None, bool]:
        """The most that they can restore of a waiting request, None for no limit, and whether one of them waits for
        its disk."""


class Alone:
    """There is no other rank."""

    several = False

    def tell(self, order: Order) -> None:
        """Nobody listens."""

    def restorable(self, order: Begin) -> int:
        return order.position

    def heard(self, offer: Offered) -> None:
        raise ValueError(f"there is no rank {offer.rank}")

    def ceiling(self, name: str) -> tuple[int | None, bool]:  # noqa: ARG002 - nobody limits anything
        return None, False
