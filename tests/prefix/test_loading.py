"""(F8) A request that waits for the disk costs the engine little, however long its prompt is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import Loaded
from millpond.prefix.keys import pack
from millpond.prefix.match import Match, RestorePlan
from millpond.prefix.planner import Layout
from millpond.prefix.records import BLOCK, Expected, Kind, RecordHead, RecordId, Tensor
from millpond.settings import SavePolicy

BLOCKS = 200


@dataclass(frozen=True)
class Nothing:
    """A record without data."""

    nbytes: int = 1000
    tensors: tuple[Tensor, ...] = ()

    def dump(self) -> bytes:
        return b""


class Disk:
    """Takes note of what is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Expected]] = []

    def read(self, expected: Expected, ticket: int) -> None:
        self.asked.append((ticket, expected))

    def write(self, head: RecordHead, payload: bytes) -> bool:
        return False

    def touch(self, ids: Sequence[RecordId]) -> None:
        """Nobody asks."""

    def discard(self, ids: Sequence[RecordId]) -> None:
        """Nobody asks."""


def test_what_arrives_block_by_block_is_planned_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = 0
    plan = Match.plan

    def counted(self: Match, disk: bool) -> RestorePlan:
        nonlocal plans
        plans += 1
        return plan(self, disk)

    monkeypatch.setattr(Match, "plan", counted)
    disk, tokens = Disk(), list(range(BLOCKS * BLOCK + 1))
    cache = PrefixCache("", Layout(0, False), 1 << 40, lambda _a, _b: Nothing(), lambda _a, _b: True)
    cache.attach(disk, SavePolicy.OFF, lambda _start, count: count * 1.0)
    node = cache.tree.root("")
    for start in range(0, len(tokens) - 1, BLOCK):
        node = cache.tree.add(node, pack(tokens[start : start + BLOCK]))
        node.disk[Kind.KV] = 1000
    query = cache.query(tokens, "")
    assert cache.offer(query, time.monotonic()).held
    assert len(disk.asked) == BLOCKS
    for ticket, expected in disk.asked:
        assert cache.offer(query, time.monotonic()).held
        cache.on_event(Loaded(ticket, expected.id, (), memoryview(b"some"), 0.001))
    offer = cache.offer(query, time.monotonic())
    assert (offer.position, offer.held) == (len(tokens) - 1, False)
    assert plans < 10
