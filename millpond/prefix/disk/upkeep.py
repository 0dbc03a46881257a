"""Looking after a folder of cached records by hand, also beside running servers: what goes is a miss for them.

Raises OSError, sqlite3.Error and UnusableIndex when the folder cannot be used.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from millpond.prefix.disk.age_clock import AgeClock
from millpond.prefix.disk.block_file import Damage, DamagedRecord, decode
from millpond.prefix.disk.files import Files
from millpond.prefix.disk.index import NamespaceUse, Row
from millpond.prefix.disk.pool import DiskPool
from millpond.prefix.disk.sweep import sweep

DIGITS = 8
"""Digits of a namespace's digest that are enough to name it."""


class Verified(NamedTuple):
    """What a verification found and did."""

    sound: int
    damaged: Mapping[Damage, int]
    """Files set aside, by what was wrong with them."""
    missing: int
    """Records taken out of the index: their file, or what they depend on, is missing or damaged."""
    adopted: int
    """Files taken into the index."""
    leftovers: int
    """Temporary files removed."""


class Removed(NamedTuple):
    """What was removed, or would be."""

    files: int
    bytes: int


class _TakeBack(Exception):  # noqa: N818 - ends a transaction that was only tried
    pass


def usage(folder: Path) -> list[NamespaceUse]:
    """What each model has in the folder, the one used last first. Changes nothing."""
    pool = DiskPool(folder, Files(), AgeClock())
    pool.open_to_read()
    try:
        return pool.index.use_by_namespace() if pool.is_open else []
    finally:
        pool.close()


def verify(folder: Path, size: Callable[[int], None], advance: Callable[[int], None]) -> Verified:
    """Bring index and files into agreement, then read every file in full and set damaged ones aside.

    ``size`` gets the bytes that will be read, ``advance`` those of each file read.
    """
    with _opened(folder) as pool:
        damaged: Counter[Damage] = Counter()
        missing = adopted = leftovers = sound = 0
        for step in sweep(pool, time.time()):
            damaged.update(step.damaged)
            missing += len(step.lost)
            adopted += len(step.adopted)
            leftovers += step.leftovers
        rows = pool.index.entries()
        size(sum(row.entry.nbytes for row in rows))
        gone: set[Path] = set()
        for row in rows:
            path = pool.path(row)
            if path not in gone:
                try:
                    _check(pool, row)
                    sound += 1
                except FileNotFoundError:
                    # A running server has evicted it since the sweep.
                    pass
                except DamagedRecord as error:
                    damaged[error.damage] += 1
                    pool.quarantine(path)
                    lost = pool.drop([row.id])
                    gone |= {pool.path(other) for other in lost}
                    missing += len(lost)
            advance(row.entry.nbytes)
        return Verified(sound, damaged, missing, adopted, leftovers)


def prune(folder: Path, *, max_bytes: int | None, older_than: float | None, dry_run: bool) -> Removed:
    """Remove what was unused for ``older_than`` seconds, then the least recently used down to ``max_bytes``."""
    with _opened(folder) as pool:
        before = pool.clock.now() - older_than if older_than is not None else None
        if dry_run:
            return _removed(_would_go(pool, max_bytes, before))
        rows = pool.expire(before) if before is not None else []
        if max_bytes is not None:
            rows += pool.evict_to(max_bytes)
        return _removed(rows)


def clear(folder: Path, *, model: str | None, dry_run: bool) -> Removed:
    """Remove everything, or all records of a model: its label, or the beginning of its namespace's digest."""
    with _opened(folder) as pool:
        if not dry_run:
            # Files the index does not know would stay behind otherwise.
            for _ in sweep(pool, time.time()):
                pass
        names = {use.digest for use in pool.index.use_by_namespace() if model is None or _is(use, model)}
        rows = [row for row in reversed(pool.index.entries()) if row.namespace in names]
        if not dry_run:
            pool.remove(rows)
            if model is None:
                for path in pool.quarantined():
                    pool.files.remove(path)
            _remove_empty_folders(pool)
        return _removed(rows)


@contextmanager
def _opened(folder: Path) -> Iterator[DiskPool]:
    pool = DiskPool(folder, Files(), AgeClock())
    try:
        pool.open()
        yield pool
    finally:
        pool.close()


def _check(pool: DiskPool, row: Row) -> None:
    files = pool.files
    descriptor = files.open(pool.path(row))
    try:
        content = memoryview(bytearray(files.size(descriptor)))
        count = files.fill(descriptor, content)
    finally:
        files.close(descriptor)
    decode(content[:count], row.namespace, row.entry)


def _would_go(pool: DiskPool, max_bytes: int | None, before: float | None) -> list[Row]:
    """What pruning would remove: it is done in the index and taken back."""
    index = pool.index
    rows: list[Row] = []
    with suppress(_TakeBack), index.transaction():
        while before is not None and (found := index.expired_leaves(before)):
            index.delete(found[0].id)
            rows += found
        while max_bytes is not None and index.totals().bytes > max_bytes and (found := index.oldest_leaves()):
            index.delete(found[0].id)
            rows += found
        raise _TakeBack
    return rows


def _is(use: NamespaceUse, model: str) -> bool:
    return use.label == model or (len(model) >= DIGITS and use.digest.startswith(model))


def _remove_empty_folders(pool: DiskPool) -> None:
    for name in pool.namespace_folders():
        for shard in pool.files.folders(pool.folder / name):
            pool.files.remove_empty(pool.folder / name / shard)
        pool.files.remove_empty(pool.folder / name)


def _removed(rows: Sequence[Row]) -> Removed:
    return Removed(len(rows), sum(row.entry.nbytes for row in rows))
