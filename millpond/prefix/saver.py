"""Decides which records go to the SSD, and hands them over a few at a time. Engine thread only.

What waits here still has its data in memory and costs nothing; what has been handed over is pinned there until the disk
has it, so that a request that comes meanwhile is served from memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from millpond.prefix.records import Expected, Kind, RecordHead, RecordId
from millpond.prefix.tree import Node
from millpond.settings import SavePolicy

UNDER_WAY_BYTES = 64 * 1024 * 1024
"""Most bytes handed over and not yet written: each is a copy in memory."""


class Disk(Protocol):
    """The SSD tier as this package uses it; every call returns at once."""

    def read(self, expected: Expected, ticket: int) -> None: ...

    def write(self, head: RecordHead, payload: bytes) -> object: ...

    def touch(self, ids: Sequence[RecordId]) -> None: ...

    def discard(self, ids: Sequence[RecordId]) -> None: ...


class Saver:
    """``unsaved``: records that left memory although the policy wanted them on disk."""

    def __init__(self, disk: Disk, policy: SavePolicy) -> None:
        self._disk = disk
        self.policy = policy
        self._waiting: OrderedDict[tuple[Node, Kind], None] = OrderedDict()
        self._under_way: dict[RecordId, tuple[Node, int]] = {}
        self.under_way_bytes = 0
        self._unwanted: set[RecordId] = set()
        """Of those under way: they turned out to be wrong."""
        self.healthy = True
        """False after a write that failed, until one succeeds: what cannot be saved does not hold memory for ever."""

    @property
    def busy(self) -> bool:
        """Whether anything waits or is being written."""
        return bool(self._waiting or self._under_way)

    @property
    def records(self) -> int:
        """How many records wait or are being written."""
        return len(self._waiting) + len(self._under_way)

    def want(self, node: Node, kinds: Iterable[Kind]) -> None:
        """Queue those of a node's records that are in memory and not on disk, behind what they depend on."""
        if self.policy is SavePolicy.OFF:
            return
        before: list[Node] = []
        here = node.parent
        while here is not None and here.parent is not None and self._lacks(here, Kind.KV):
            before.append(here)
            here = here.parent
        for each in reversed(before):
            self._waiting[each, Kind.KV] = None
        for kind in kinds:
            if self._lacks(node, kind):
                self._waiting[node, kind] = None

    def _lacks(self, node: Node, kind: Kind) -> bool:
        """Whether a record is in memory, not on disk, and not on its way there."""
        safe = kind in node.disk or RecordId(node.key, kind) in self._under_way
        return kind in node.records and not safe and (node, kind) not in self._waiting

    def saved(self, node: Node) -> bool:
        """Whether everything that memory holds of a node is on disk; a window alone is not worth a write."""
        return all(kind in node.disk for kind in node.records if kind is not Kind.WINDOW)

    def pump(self) -> None:
        """Hand over what fits. A child never before its parent: disk blocks without their beginning are useless."""
        room = UNDER_WAY_BYTES - self.under_way_bytes
        while self._waiting and room > 0:
            (node, kind), _ = self._waiting.popitem(last=False)
            payload = node.records.get(kind)
            if payload is None or kind in node.disk or not node.alive or not self._reachable(node.parent):
                continue
            node.pins += 1
            self._under_way[RecordId(node.key, kind)] = node, payload.nbytes
            self.under_way_bytes += payload.nbytes
            room -= payload.nbytes
            self._disk.write(head_of(node, kind), payload.dump())

    def _reachable(self, parent: Node | None) -> bool:
        """Whether what follows ``parent`` would be found again: it begins a chain, or is on disk or on its way."""
        if parent is None or parent.parent is None:
            return parent is not None
        return Kind.KV in parent.disk or RecordId(parent.key, Kind.KV) in self._under_way

    def written(self, record: RecordId, nbytes: int, problem: str) -> Node | None:
        """The disk has finished with a record. Returns its node, which is no longer pinned for it."""
        node, size = self._under_way.pop(record, (None, 0))
        self.under_way_bytes -= size
        if node is not None:
            node.pins -= 1
            if record in self._unwanted:
                self._unwanted.discard(record)
                if not problem:
                    self._disk.discard([record])
                self.want(node, (record.kind,))
                return node
            if not problem:
                node.disk[record.kind] = nbytes
        self.healthy = not problem
        return node

    def discard(self, node: Node) -> None:
        """Remove everything of a node from the disk, also what is being written now."""
        under_way = {each for each in (RecordId(node.key, kind) for kind in Kind) if each in self._under_way}
        self._unwanted |= under_way
        if wrong := under_way | {RecordId(node.key, kind) for kind in node.disk}:
            self._disk.discard(sorted(wrong))
        node.disk.clear()


def head_of(node: Node, kind: Kind) -> RecordHead:
    """What the disk has to know of a record in order to write it, or to check what it reads."""
    payload = node.records.get(kind)
    assert node.parent is not None
    return RecordHead(
        key=node.key,
        kind=kind,
        parent=node.parent.key,
        start=node.start,
        tokens=node.tokens,
        tensors=payload.tensors if payload is not None else (),
    )
