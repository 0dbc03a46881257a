"""How much of a matched chain of blocks can really be restored. Pure.

A position can be resumed only if every layer has what it needs there: keys and values of all tokens before it, those
of the last window for sliding layers, and for recurrent layers a snapshot taken exactly there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from millpond.prefix.records import BLOCK, Kind


@dataclass(frozen=True)
class Layout:
    """What kinds of layers a model has."""

    window: int
    """The largest sliding window in tokens; 0 for none."""
    state: bool
    """Some layer is recurrent."""
    step: int = 1
    """Positions that are resumed are multiples of so many tokens, and so are the ends of blocks that are kept."""
    whole: bool = False
    """Blocks are kept in a way of which a part is of no use."""

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Every block has a kv record, be it empty: it is what makes the block known."""
        has = {Kind.KV: True, Kind.WINDOW: self.window > 0, Kind.STATE: self.state}
        return tuple(kind for kind, present in has.items() if present)

    @property
    def exact(self) -> bool:
        """Blocks can be resumed at their ends only, because of a snapshot, a window shorter than a block, or how they
        are kept."""
        return self.state or self.whole or 0 < self.window < BLOCK

    @property
    def reach(self) -> int:
        """Positions before a resume point that sliding layers need."""
        return max(0, self.window - 1)

    @property
    def trail(self) -> int:
        """Blocks before a resume point whose window records may be needed."""
        return -(-self.reach // BLOCK) + 1 if self.window else 0


class Link(NamedTuple):
    """One matched block: tokens [start, end) are the prompt's. The last one may be matched in part only."""

    start: int
    end: int
    kv: bool
    """Its kv record is at hand."""
    window_from: int
    """Positions [window_from, end) are covered by its window record; ``end`` when it has none."""
    state: bool
    """A snapshot exactly at ``end``."""


def restorable(links: Sequence[Link], layout: Layout) -> int:
    """The largest position that can be resumed after these blocks, which follow each other from position 0."""
    best, covered_from = 0, 0
    for link in links:
        if not link.kv:
            break
        if link.window_from > link.start:
            covered_from = link.window_from
        has_window = covered_from <= max(0, link.end - layout.reach)
        if (link.state or not layout.state) and has_window:
            best = link.end
    return best


def needed(links: Sequence[Link], layout: Layout, resume: int) -> list[tuple[int, Kind]]:
    """Which records a restore to ``resume`` reads, as (index of link, kind), in order."""
    wanted: list[tuple[int, Kind]] = []
    for index, link in enumerate(links):
        if link.start >= resume:
            break
        wanted.append((index, Kind.KV))
        if layout.window and link.end > resume - layout.reach:
            wanted.append((index, Kind.WINDOW))
        if layout.state and link.end == resume:
            wanted.append((index, Kind.STATE))
    return wanted
