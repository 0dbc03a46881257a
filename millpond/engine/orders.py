"""What a step does to rows, prompts and blocks, as data: what the leader of a group tells the other ranks.

Everything that decides a shape or a token is in here, so that the ranks cannot differ. Plain data: no mlx.
"""

from __future__ import annotations

import msgspec

from millpond.types import PrefillChunk, Request


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
    """Compute chunks of prompts in one forward; after its last chunk a prompt gets the next row."""

    chunks: tuple[PrefillChunk, ...]


class SetAside(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A request loses its row or its begun prompt, and waits again. ``kept``: what is in its row stays cached."""

    name: str
    scrub: bool = False
    kept: bool = False


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
