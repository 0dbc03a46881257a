"""Payloads and layouts made up for tests of the prefix cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from millpond.prefix.cache import PrefixCache
from millpond.prefix.keys import Namespace
from millpond.prefix.memory import MemoryTier
from millpond.prefix.planner import Layout
from millpond.prefix.query import PrefixQuery
from millpond.prefix.records import BLOCK, Kind, Tensor
from millpond.prefix.tree import Node, Tree

LAYOUTS = {
    "kv": Layout(window=0, state=False),
    "narrow": Layout(window=24, state=False),
    "block": Layout(window=64, state=False),
    "wide": Layout(window=100, state=False),
    "state": Layout(window=0, state=True),
    "both": Layout(window=24, state=True),
}
NAMESPACE = Namespace(weights="w", kv_format="float32", layers=["kv 2 16"], code="0.0").digest


@dataclass(frozen=True)
class Fake:
    """A payload whose bytes say what it is of: the same for equal tokens before it, another for others."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (Tensor("uint8", (len(self.data),), len(self.data)),)

    def dump(self) -> bytes:
        return self.data


def fake(salt: str, tokens: Sequence[int], start: int, kind: Kind, size: int = 64) -> Fake:
    """The payload of the block that begins at ``start`` and ends with these tokens."""
    said = f"{salt}|{kind}|{start}|{','.join(map(str, tokens))}|".encode()
    return Fake(said + b"." * max(0, size - len(said)))


def make(tensors: Sequence[Tensor], payload: memoryview) -> Fake:
    assert sum(tensor.nbytes for tensor in tensors) == payload.nbytes
    return Fake(bytes(payload))


def same(left: object, right: object) -> bool:
    return left == right


def new_cache(layout: Layout, limit_bytes: int = 1 << 20, selfcheck: int = 0) -> PrefixCache:
    return PrefixCache(NAMESPACE, layout, limit_bytes, make, same, selfcheck)


def blocks_of(length: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The blocks of a sequence from a position on, the last one a tail maybe."""
    for begin in range(start // BLOCK * BLOCK, length, BLOCK):
        yield begin, min(begin + BLOCK, length)


def store(
    cache: PrefixCache,
    query: PrefixQuery,
    tokens: Sequence[int],
    salt: str = "",
    *,
    states: Sequence[int] = (),
    size: int = 64,
) -> None:
    """Keep every block of a sequence as the engine does, with snapshots at these positions and at its end."""
    query.match.chain.extend(tokens)
    for begin, end in blocks_of(len(tokens)):
        wanted = [kind for kind in cache.layout.kinds if kind is not Kind.STATE or end in (*states, len(tokens))]
        kinds = cache.missing(query, begin, end, wanted)
        cache.keep(query, begin, end, {kind: fake(salt, tokens[:end], begin, kind, size) for kind in kinds})
    cache.end_at(query, len(tokens), last=True)


def ring(memory: MemoryTier) -> list[Node]:
    """The nodes in order of eviction."""
    found, node = [], memory._ends.newer
    while node is not None and node is not memory._ends:
        found.append(node)
        node = node.newer
    assert node is memory._ends
    assert all(left.newer is right and right.older is left for left, right in pairwise(found))
    return found


def check_tree(tree: Tree) -> None:
    """No key without data, every child where it belongs (E4)."""
    for node in tree.nodes():
        assert node.alive
        assert node.records or node.disk or node.children or node.pins, "a key without data"
        assert node.parent is not None
        assert node.parent.children[node.tokens] is node
        assert node.parent.parent is None or tree.get(node.parent.key) is node.parent
        assert node.start == node.parent.end
        assert node.start % BLOCK == 0
        assert node.full or not node.children, "only full blocks have children"
    for node in {*tree.nodes(), *(node.parent for node in tree.nodes() if node.parent is not None)}:
        assert node.order == sorted(node.children)
        assert node.memory_children == sum(bool(child.records) for child in node.children.values())
        lengths = [len(child.tokens) for child in node.children.values() if not child.full]
        assert node.tail_lengths == {length: lengths.count(length) for length in lengths}


def check_memory(cache: PrefixCache) -> None:
    """Bytes and blocks are what the nodes hold; the list of those that may go is complete (E5, E6)."""
    memory, tree = cache._memory, cache.tree
    held = [node for node in tree.nodes() if node.records]
    recount = sum(1024 + sum(payload.nbytes for payload in node.records.values()) for node in held)
    assert (cache.blocks, cache.nbytes) == (len(held), recount)
    listed = ring(memory)
    assert len(set(listed)) == len(listed)
    assert set(listed) <= set(held)
    for node in held:
        if node.memory_children == 0 and node.pins == 0:
            assert node.newer is not None, "it could go, and nobody will find it"
    assert set(memory._spare) <= {node for node in held if Kind.WINDOW in node.records}


@contextmanager
def watched_evictions(cache: PrefixCache) -> Iterator[list[Node]]:
    """Asserts at each eviction that the node has no children in memory; yields those that went."""
    gone: list[Node] = []
    drop = cache._memory.drop

    def watched(node: Node, kinds: Sequence[Kind] | None = None) -> None:
        if kinds is None:
            assert node.memory_children == 0, "evicted before its children"
            assert node.pins == 0, "evicted although pinned"
            gone.append(node)
        drop(node, kinds)

    cache._memory.drop = watched  # type: ignore[method-assign]
    try:
        yield gone
    finally:
        del cache._memory.drop  # type: ignore[method-assign]
