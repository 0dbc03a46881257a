"""Bringing files and index into agreement after a crash, a lost index, or a hand that removed files.

In 256 small steps, one per first byte of a key, so that the thread doing it can do other work in between.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from millpond.prefix.disk.block_file import PREFIX_BYTES, Damage, DamagedRecord, decode_head, layout
from millpond.prefix.disk.files import FileInfo, Files
from millpond.prefix.disk.index import Row
from millpond.prefix.disk.pool import DiskPool, entry_of
from millpond.prefix.records import Kind, RecordHead

LEFTOVER_SECONDS = 3600.0
"""A temporary file this old belongs to nobody, whatever its name says: numbers of processes are used again."""
STEPS = 256
_KINDS = "|".join(Kind)
_RECORD = re.compile(rf"([0-9a-f]{{64}})\.({_KINDS})")
_TEMPORARY = re.compile(rf"[0-9a-f]{{64}}\.(?:{_KINDS})\.([0-9]+)\.[0-9]+\.tmp")


class Swept(NamedTuple):
    """What one step found."""

    adopted: list[Row]
    lost: list[Row]
    """Rows whose file is missing or damaged, and what depended on them."""
    leftovers: int
    damaged: list[Damage]


def sweep(pool: DiskPool, started: float) -> Iterator[Swept]:
    """Go through the whole folder. A read-only pool is only looked at: nothing is stored or removed.

    ``started`` is when this process began to write here, in seconds since 1970: temporary files that bear this
    process's number and are older come from one that had it before (the first process of a container, say).
    """
    # A namespace that appears later belongs to a running process, and its rows have files.
    folders = pool.namespace_folders()
    for first in range(STEPS):
        yield _sweep_shard(pool, folders, first, started)


def read_head(files: Files, path: Path) -> tuple[str, RecordHead]:
    """Namespace digest and head of a record's file; its payload is not verified. Raises DamagedRecord, OSError."""
    descriptor = files.open(path)
    try:
        size = files.size(descriptor)
        prefix = bytearray(PREFIX_BYTES)
        files.fill(descriptor, memoryview(prefix))
        # The size is checked before the header is read: a damaged length must not ask for gigabytes.
        parts = layout(prefix)
        if parts.file_bytes != size:
            raise DamagedRecord(Damage.LENGTH, f"{size} bytes where the file says {parts.file_bytes}")
        beginning = prefix.ljust(parts.header_end, b"\0")
        files.fill(descriptor, memoryview(beginning)[PREFIX_BYTES:])
    finally:
        files.close(descriptor)
    return decode_head(bytes(beginning), size)


def _sweep_shard(pool: DiskPool, folders: list[str], first: int, started: float) -> Swept:
    rows = {pool.path(row): row for row in pool.index.shard(first)} if pool.is_open else {}
    adopted: list[Row] = []
    missing = dict(rows)
    leftovers = 0
    damaged: list[Damage] = []
    lost: list[Row] = []
    for name in folders:
        folder = pool.folder / name / f"{first:02x}"
        for info in pool.files.listing(folder):
            path = folder / info.name
            row = missing.pop(path, None)
            if row is not None and row.entry.nbytes == info.size:
                continue
            if _is_leftover(pool, info, started):
                leftovers += pool.files.remove(path)
            elif _RECORD.fullmatch(info.name):
                try:
                    adopted.append(_inspect(pool, path, info))
                except FileNotFoundError:
                    # Another process has just removed it.
                    continue
                except DamagedRecord as error:
                    damaged.append(error.damage)
                    if row is not None:
                        lost.append(row)
                    if not pool.read_only:
                        pool.quarantine(path)
    # A row may be younger than the listing: ask again before it goes.
    lost += [row for row in missing.values() if not pool.has_file(row.namespace, row.id)]
    if not pool.read_only:
        adopted, lost = _store(pool, adopted, lost)
    return Swept(adopted, lost, leftovers, damaged)


def _store(pool: DiskPool, adopted: list[Row], lost: list[Row]) -> tuple[list[Row], list[Row]]:
    """Change the index; returns what was in fact taken in and removed."""
    entered: list[Row] = []
    if adopted:
        with pool.index.transaction():
            entered = [row for row in adopted if pool.has_file(row.namespace, row.id)]
            for row in entered:
                pool.index.adopt(*row)
    return entered, pool.drop([row.id for row in lost]) if lost else []


def _inspect(pool: DiskPool, path: Path, info: FileInfo) -> Row:
    namespace, head = read_head(pool.files, path)
    row = Row(namespace, entry_of(head, info.size), min(info.changed, pool.clock.now()))
    if pool.path(row) != path:
        raise DamagedRecord(Damage.KEY, "the file has the name of another record")
    return row


def _is_leftover(pool: DiskPool, info: FileInfo, started: float) -> bool:
    match = _TEMPORARY.fullmatch(info.name)
    if match is None or pool.read_only:
        return False
    pid = int(match[1])
    if pid == os.getpid():
        return info.changed < started
    return not pool.files.alive(pid) or pool.clock.now() - info.changed > LEFTOVER_SECONDS
