"""What proposes draft tokens, as the engine sees it. docs/how-to/add-a-proposer.md shows how one is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from millpond.types import Request, SpecMode


class Source(NamedTuple):
    """A kind of draft tokens. How often they are right is learnt for each kind apart."""

    mode: SpecMode
    """Whose they are."""
    first_chance: float
    """That one is right if those before it are, until something has been seen. Differs among the kinds of one mode."""


class DraftOffer(NamedTuple):
    """Draft tokens that could be had for one row."""

    name: str
    most: int
    source: Source
    tokens: Sequence[int] = ()
    """They themselves, ``most`` of them, if they are known by now; else ``propose`` is asked for them."""


class Proposer:
    """Proposes draft tokens for the requests of one mode. Engine thread only.

    The committed tokens of a request are the only truth, and each call gets all of them: they tell what has become of
    earlier proposals. What a forward of the served model knows besides is in its rows, where ``mtp`` finds it.
    What is proposed never changes an answer, and what is raised costs draft tokens and nothing else.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that it holds."""
        return 0

    def begin(self, request: Request) -> None:
        """A request that is to have draft tokens."""

    def end(self, name: str) -> None:
        """It is over, or goes on without. Never raises."""

    def answered(self, salt: str, answer: Sequence[int]) -> None:
        """A request of whatever mode has been answered; only requests of the same salt may learn from that."""

    def offer(self, name: str, tokens: Sequence[int], most: int, unread: int) -> DraftOffer | None:  # noqa: ARG002
        """What could be had behind ``unread`` more tokens than these, at most so many; None: nothing."""
        return None

    def propose(
        self,
        wanted: Mapping[str, int],  # noqa: ARG002 - offers that come with their tokens need no more
        tokens: Mapping[str, Sequence[int]],  # noqa: ARG002 - the same
    ) -> dict[str, list[int]]:
        """So many draft tokens for those whose offers came without; the time it takes is theirs.

        ``tokens``: the committed ones of every request there is. On failure nobody has any.
        """
        return {}

    def behind(self, name: str, tokens: Sequence[int]) -> Source | None:  # noqa: ARG002 - most need not read
        """What it could offer if it had read what these tokens say; None: it has, or need not."""
        return None

    def read(self, name: str, tokens: Sequence[int], most: int) -> bool:  # noqa: ARG002 - the same
        """Read on, about so many of the tokens. Returns whether that leads to offers some day."""
        return False

    def trim(self) -> None:
        """There are no requests: give back the memory that they left behind."""
