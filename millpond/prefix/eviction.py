"""What leaves memory when room is needed, and what is remembered of it. Engine thread only."""

from __future__ import annotations

from collections import OrderedDict

from millpond.prefix.memory import MemoryTier
from millpond.prefix.records import Kind
from millpond.prefix.saver import UNDER_WAY_BYTES, Saver
from millpond.prefix.tree import Node
from millpond.settings import SavePolicy
from millpond.types import PrefixCounters

GHOSTS = 65536
"""Keys of evicted blocks that are remembered, so that a miss can be explained."""
LOOK_AT = 16
"""Oldest nodes looked at for one whose data is safe on disk before one that is not has to go."""
SNAPSHOTS_SHARE = 0.5
"""Of memory that is short, what snapshots of recurrent layers may take beside blocks."""
SAVE_AHEAD = 0.9
"""Share of the limit above which the policy ``evicted`` saves what would go next."""


class Evictor:
    """``ghosts``: keys of blocks that are gone, oldest first."""

    def __init__(self, memory: MemoryTier, counters: PrefixCounters) -> None:
        self._memory = memory
        self._counters = counters
        self.ghosts: OrderedDict[bytes, None] = OrderedDict()

    def fit(self, limit: int, saver: Saver | None, *, ahead: bool = True) -> bool:
        """Evict until at most ``limit`` bytes are held, or only what has to be saved first. Whether anything went.

        ``ahead``: not after a write that the disk has refused, which would be tried again at once, and for ever.
        """
        if ahead and saver is not None and saver.policy is SavePolicy.EVICTED:
            self._save_ahead(limit, saver)
        changed = False
        while self._memory.nbytes > limit:
            if (spare := self._memory.spare_windows()) is not None:
                self._memory.drop(spare, (Kind.WINDOW,))
            elif (spare := self._spare_snapshot(limit, saver)) is not None:
                self._counters.snapshots_dropped += 1
                self._memory.drop(spare, (Kind.STATE,))
            else:
                victim = self._victim(self._memory.nbytes - limit, saver)
                if victim is None:
                    break
                self._counters.evicted += 1
                if not victim.disk:
                    self.remember(victim)
                self._memory.drop(victim)
            changed = True
        return changed

    def remember(self, node: Node) -> None:
        """Its data is gone; a request that misses it is told why."""
        self.ghosts[node.key] = None
        if len(self.ghosts) > GHOSTS:
            self.ghosts.popitem(last=False)

    def _save_ahead(self, limit: int, saver: Saver) -> None:
        if self._memory.nbytes > SAVE_AHEAD * limit and saver.under_way_bytes < UNDER_WAY_BYTES:
            oldest = self._memory.oldest(LOOK_AT)
            # A disk that refuses is tried with one at a time, that will be there when it is asked for.
            for node in oldest if saver.healthy else oldest[-1:]:
                if not node.lost:  # a disk that is too small would let go of another one, and so on for ever
                    saver.want(node, Kind)

    def _spare_snapshot(self, limit: int, saver: Saver | None) -> Node | None:
        """A node whose snapshot goes before any block does, because all of them take too much; None: none has to."""
        if self._memory.snapshot_bytes <= SNAPSHOTS_SHARE * limit:
            return None
        candidates = self._memory.oldest_snapshots(LOOK_AT)
        oldest = next(iter(candidates), None)
        if oldest is None or saver is None or saver.policy is not SavePolicy.EVICTED or not saver.healthy:
            return oldest
        saver.want(oldest, (Kind.STATE,))
        return next((node for node in candidates if Kind.STATE in node.disk), None)

    def _victim(self, excess: int, saver: Saver | None) -> Node | None:
        """The least recently used leaf, or one that is safe on disk if the policy wants that; None: none may go yet."""
        candidates = self._memory.oldest(LOOK_AT if saver is not None else 1)
        oldest = next(iter(candidates), None)
        if saver is None or saver.policy is not SavePolicy.EVICTED or not saver.healthy:
            return oldest
        safe = next((node for node in candidates if saver.saved(node)), None)
        if safe is not None or oldest is None:
            return safe
        if saver.busy and excess <= UNDER_WAY_BYTES:
            return None
        self._counters.unsaved += 1
        return oldest
