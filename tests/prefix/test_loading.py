"""(F8) A request that waits for the disk costs the engine little, however long its prompt is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import Loaded
from millpond.prefix.keys import pack
from millpond.prefix.match import Match, RestorePlan
from millpond.prefix.planner import Layout
from millpond.prefix.query import End
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


LAYOUTS = (Layout(0, False), Layout(100, False), Layout(16, False), Layout(0, True), Layout(300, True))


@given(
    layout=st.sampled_from(LAYOUTS),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
    rare=st.integers(1, 5),
    room=st.integers(0, 300),
    in_memory=st.integers(0, 10),
)
def test_no_more_is_read_than_memory_may_hold(
    layout: Layout, sizes: list[tuple[int, int, int]], rare: int, room: int, in_memory: int
) -> None:
    """Whatever the layers and the sizes: what is read takes at most half of the limit, and goes as far as that can."""
    disk, tokens = Disk(), list(range(len(sizes) * BLOCK + 1))
    cache = PrefixCache("", layout, 2 * room, lambda _a, _b: Nothing(), lambda _a, _b: True)
    cache.attach(disk, SavePolicy.OFF, lambda _start, count: count * 1.0)
    node, nodes = cache.tree.root(""), []
    for index, kinds in enumerate(sizes):
        node = cache.tree.add(node, pack(tokens[index * BLOCK : index * BLOCK + BLOCK]))
        node.disk = {kind: size for kind, size in zip(Kind, kinds, strict=True) if kind in layout.kinds}
        if index % rare:
            node.disk.pop(Kind.STATE, None)
        if index < in_memory:
            node.records[Kind.KV] = Nothing()
        nodes.append(node)
    query = cache.query(tokens, "")
    before = cache.plan(query, disk=False).position
    held = cache.offer(query, time.monotonic()).held
    size_of = {RecordId(node.key, kind): size for node in nodes for kind, size in node.disk.items()}
    assert sum(size_of[asked.id] for _, asked in disk.asked) <= room
    reachable = [before]
    for most in range(BLOCK, len(tokens), BLOCK):
        plan = query.match.plan(disk=True, most=most)
        needs = [(node, kind) for node, kind in plan.needs if kind not in node.records]
        if sum(node.disk[kind] for node, kind in needs) <= room:
            reachable.append(plan.position)
    assert held == (max(reachable) > before)
    if held:
        assert before < query.target.position <= max(reachable)
        if layout.kinds == (Kind.KV,):
            assert query.target.position == max(reachable)
    else:
        assert (query.refused is End.MEMORY) == (cache.plan(query, disk=True).position > before)
