"""Holding the limits of the SSD tier: cap, free space, age. The writer's thread; raises what the pool raises."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection, Sequence

from millpond.observe.log import fields
from millpond.prefix.disk.events import DiskEntry
from millpond.prefix.disk.index import Row, is_full
from millpond.prefix.disk.pool import DiskPool
from millpond.prefix.disk.stats import Tally
from millpond.settings import PrefixSettings

_log = logging.getLogger("millpond.prefix.disk.tier")

KEEP_WHEN_FULL = 0.95
"""Part of the records that stays when the disk is full."""


class LimitKeeper:
    """Removes what has to go, counts it, and passes the rows on to ``removed``."""

    def __init__(
        self, pool: DiskPool, settings: PrefixSettings, tally: Tally, removed: Callable[[Sequence[Row]], None]
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._tally = tally
        self._removed = removed

    def valid(self, namespace: str) -> list[DiskEntry]:
        """What the index knows of a namespace and what is not too old; nothing when it cannot say."""
        pool, ttl = self._pool, self._settings.ssd_ttl
        if not pool.is_open:
            return []
        after = pool.clock.now() - ttl if ttl else float("-inf")
        try:
            return [row.entry for row in pool.index.entries(namespace, after)]
        except (sqlite3.Error, ValueError):
            # Also rows that no record could have made.
            return []

    def within_budget(self, nbytes: int) -> bool:
        """Whether so many more bytes may be written today."""
        budget = self._settings.ssd_daily_writes
        return not budget or self._pool.index.written(self._pool.clock.day()) + nbytes <= budget

    def make_room(self, nbytes: int, under_way: int, spared: Collection[bytes]) -> bool:
        """Evict until a file of ``nbytes`` fits under the cap and above the free-space floor; False when it cannot.

        ``under_way`` are bytes of files that have no row yet; the blocks whose keys are ``spared`` stay.
        """
        pool = self._pool
        total = pool.totals().bytes
        limit = self._settings.cache_ssd - under_way - nbytes
        lacking = self._lacking(nbytes)
        if limit < 0 or lacking > total:
            # Emptying the whole cache would not help, so nothing is evicted for it.
            return False
        # Without a lack of space ``total`` is no limit: another process may have written since it was asked for.
        self._evict_to(min(limit, total - lacking) if lacking > 0 else limit, spared)
        return pool.totals().bytes <= limit and self._lacking(nbytes) <= 0

    def hold_cap(self) -> None:
        """Another process may have used the same room, or the cap was larger at the last start."""
        self._evict_to(self._settings.cache_ssd)

    def hold_all(self) -> None:
        """Age, cap and free space. A clock that was set expires nothing."""
        pool, ttl = self._pool, self._settings.ssd_ttl
        jump = pool.clock.settle()
        if jump:
            _log.warning("the clock was set; ages of cached records stay as they were", extra=fields(seconds=jump))
            with pool.index.transaction():
                pool.index.shift_ages(jump, pool.clock.now())
        if ttl:
            rows = pool.expire(pool.clock.now() - ttl)
            self._tally.add(expired=len(rows))
            self._removed(rows)
        self.hold_cap()
        lacking = self._lacking(0)
        if lacking > 0:
            self._evict_to(max(0, pool.totals().bytes - lacking))

    def shrink(self) -> None:
        """On a full disk, let 5 % of the records go, if they are what fills it."""
        pool = self._pool
        total = pool.totals().bytes
        if pool.read_only or total * 2 < pool.files.space(pool.folder).used:
            return
        keep = int(total * KEEP_WHEN_FULL)
        try:
            self._evict_to(keep)
        except sqlite3.Error as error:
            if not is_full(error):
                raise
            rows = pool.evict_files(total - keep)
            self._tally.add(evicted=len(rows))
            self._removed(rows)

    def _lacking(self, nbytes: int) -> int:
        return self._settings.ssd_min_free + nbytes - self._pool.files.space(self._pool.folder).free

    def _evict_to(self, limit: int, spared: Collection[bytes] = ()) -> None:
        if self._pool.totals().bytes > limit:
            rows = self._pool.evict_to(limit, spared)
            self._tally.add(evicted=len(rows))
            self._removed(rows)
