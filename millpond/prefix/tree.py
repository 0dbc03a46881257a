"""The tree of cached blocks: which token sequences are known, and what is held of each, in memory and on disk.

A node is one block. Children are found by their tokens themselves, so a match is a comparison of tokens and never of
hashes alone. Full blocks may have children; tails are leaves. A node lives while it holds a record in memory, is on
disk, or has children: no key without data. Engine thread only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from weakref import WeakValueDictionary

from millpond.prefix.keys import TOKEN_BYTES, common_tokens, next_key, root_key
from millpond.prefix.records import BLOCK, Kind, Payload

BLOCK_BYTES = BLOCK * TOKEN_BYTES


class Node:
    """One block and what is held of it. Fields are for this package; nobody else changes them."""

    __slots__ = (
        "__weakref__",
        "alive",
        "children",
        "disk",
        "key",
        "lost",
        "memory_children",
        "newer",
        "older",
        "order",
        "parent",
        "pins",
        "records",
        "resume",
        "start",
        "tail_lengths",
        "tokens",
    )

    def __init__(self, key: bytes, parent: Node | None, tokens: bytes, start: int) -> None:
        self.key = key
        self.parent = parent
        self.tokens = tokens
        """Packed; see keys.pack."""
        self.start = start
        self.children: dict[bytes, Node] = {}
        self.order: list[bytes] = []
        """The children's tokens, sorted: the one that shares most with a query is next to the query's place."""
        self.tail_lengths: dict[int, int] = {}
        """How many children shorter than a block there are, by bytes of their tokens."""
        self.records: dict[Kind, Payload] = {}
        self.disk: dict[Kind, int] = {}
        """Bytes of the files that hold its records."""
        self.pins = 0
        """Held in memory for a restore or a write that is under way."""
        self.memory_children = 0
        """Children that hold records in memory."""
        self.resume: float | None = None
        """When a prompt or an answer last ended here, seconds, monotonic: requests are likely to resume here."""
        self.lost = False
        """The disk has let go of some of it since it was last stored or used."""
        self.alive = True
        self.newer: Node | None = None
        self.older: Node | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens) // TOKEN_BYTES

    @property
    def full(self) -> bool:
        return len(self.tokens) == BLOCK_BYTES

    def line(self, most: int | None = None) -> list[Node]:
        """The chain of nodes that ends with this one, root side first: all of it, or its last ``most``."""
        line: list[Node] = []
        here: Node | None = self
        while here is not None and here.parent is not None and (most is None or len(line) < most):
            line.append(here)
            here = here.parent
        return line[::-1]

    def child(self, tokens: bytes) -> Node | None:
        """The child with exactly these tokens."""
        return self.children.get(tokens)

    def closest(self, tokens: bytes) -> tuple[Node | None, int]:
        """The child that shares the most leading tokens, and how many; (None, 0) when none shares any.

        Of two that share as many the one in memory.
        """
        place = bisect_left(self.order, tokens)
        best: tuple[Node | None, int] = (None, 0)
        for neighbour in self.order[max(0, place - 1) : place + 1]:
            node, shared = self.children[neighbour], common_tokens(neighbour, tokens)
            if shared > best[1] or (shared == best[1] > 0 and bool(node.records)):
                best = node, shared
        return best

    def tails(self, tokens: bytes) -> Iterator[Node]:
        """Children shorter than a block whose tokens begin ``tokens``, shortest first."""
        for length in sorted(self.tail_lengths):
            if length <= len(tokens) and (tail := self.children.get(tokens[:length])) is not None:
                yield tail


class Tree:
    """All nodes of one namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._roots: WeakValueDictionary[bytes, Node] = WeakValueDictionary()
        """A root lives as long as a child or a request refers to it."""
        self._nodes: dict[bytes, Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def nodes(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def root(self, salt: str) -> Node:
        """Where a tenant's chains begin."""
        return self._root(root_key(self._namespace, salt))

    def _root(self, key: bytes) -> Node:
        root = self._roots.get(key)
        if root is None:
            self._roots[key] = root = Node(key, None, b"", 0)
        return root

    def get(self, key: bytes) -> Node | None:
        """The block of a chain key."""
        return self._nodes.get(key)

    def parent_of(self, key: bytes, start: int) -> Node | None:
        """The node under which a block at ``start`` with this parent key belongs; a root is made when it is missing."""
        return self._root(key) if start == 0 else self._nodes.get(key)

    def add(self, parent: Node, tokens: bytes) -> Node:
        """The child of ``parent`` with these tokens, made when it is missing. Only full blocks have children."""
        node = parent.children.get(tokens)
        if node is None:
            node = Node(next_key(parent.key, tokens), parent, tokens, parent.end)
            parent.children[tokens] = node
            insort(parent.order, tokens)
            if not node.full:
                parent.tail_lengths[len(tokens)] = parent.tail_lengths.get(len(tokens), 0) + 1
            self._nodes[node.key] = node
        return node

    def prune(self, node: Node) -> None:
        """Forget ``node``, and then its ancestors, as far as nothing is held of them any more."""
        while node.parent is not None and node.alive and not (node.records or node.disk or node.children or node.pins):
            parent = node.parent
            del parent.children[node.tokens]
            del parent.order[bisect_left(parent.order, node.tokens)]
            if not node.full:
                parent.tail_lengths[len(node.tokens)] -= 1
                if not parent.tail_lengths[len(node.tokens)]:
                    del parent.tail_lengths[len(node.tokens)]
            del self._nodes[node.key]
            node.alive = False
            node = parent
