"""What of one sequence is cached: the path of its tokens through the tree. Engine thread only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from millpond.prefix.keys import TOKEN_BYTES, next_key, pack
from millpond.prefix.planner import Layout, Link, needed, restorable
from millpond.prefix.records import BLOCK, Kind
from millpond.prefix.tree import Node

UNLIMITED = 1 << 62


class Chain:
    """The tokens of one sequence, packed, and the keys of its blocks, both extended on demand."""

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._packed = b""
        self._keys: list[bytes] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Take over what ``tokens``, the whole sequence, has gained."""
        known = len(self._packed) // TOKEN_BYTES
        if len(tokens) > known:
            self._packed += pack(tokens[known:])

    def tokens(self, start: int, end: int) -> bytes:
        """Packed tokens [start, end), or fewer where the sequence ends."""
        return self._packed[start * TOKEN_BYTES : end * TOKEN_BYTES]

    def key(self, start: int, end: int) -> bytes:
        """Chain key of the block [start, end); ``start`` on the block grid."""
        while len(self._keys) < start // BLOCK:
            begin = len(self._keys) * BLOCK
            self._keys.append(next_key(self._keys[-1] if self._keys else self._root, self.tokens(begin, begin + BLOCK)))
        return next_key(self._keys[start // BLOCK - 1] if start else self._root, self.tokens(start, end))


class Part(NamedTuple):
    """A node of which the first ``used`` tokens match."""

    node: Node
    used: int

    @property
    def end(self) -> int:
        return self.node.start + self.used


class RestorePlan(NamedTuple):
    """A position that can be resumed, and the blocks it takes, root side first."""

    position: int
    parts: tuple[Part, ...]
    needs: tuple[tuple[Node, Kind], ...]
    """The records to read, in order of position."""


NOTHING = RestorePlan(0, (), ())


class Match:
    """The longest known prefix of a sequence. ``limit``: most tokens to restore; one token must be left to compute."""

    def __init__(self, root: Node, tokens: Sequence[int], layout: Layout) -> None:
        self.chain = Chain(root.key)
        self.chain.extend(tokens)
        self.limit = len(tokens) - 1
        self.root = root
        self.ceiling = UNLIMITED
        """Nothing beyond it is restored, for another rank lacks it."""
        self._layout = layout
        self._path: list[Node] = []

    def restart(self, tokens: Sequence[int]) -> None:
        """The sequence lost what was computed of it and begins again with all its ``tokens``."""
        self.chain.extend(tokens)
        self.limit = len(tokens) - 1
        self.ceiling = UNLIMITED

    @property
    def depth(self) -> int:
        """Tokens of whole blocks that are known, in memory or on disk."""
        return len(self._path) * BLOCK

    def follow(self) -> list[Node]:
        """Bring the path of whole blocks up to date and return it."""
        while self._path and not self._path[-1].alive:
            self._path.pop()
        node = self._path[-1] if self._path else self.root
        while self.depth + BLOCK <= self.limit:
            following = node.child(self.chain.tokens(self.depth, self.depth + BLOCK))
            if following is None:
                break
            self._path.append(following)
            node = following
        return self._path

    def plan(self, disk: bool, most: int = UNLIMITED) -> RestorePlan:
        """The best position to resume, up to ``most``, with what is in memory, or with what is on disk as well."""
        most, step = min(self.limit, self.ceiling, most), self._layout.step
        while True:
            plan = self._up_to(most // step * step, disk)
            if plan.position % step == 0:
                return plan
            most = plan.position

    def _up_to(self, most: int, disk: bool) -> RestorePlan:
        path = self.follow()[: most // BLOCK]
        parts = [Part(node, BLOCK) for node in path]
        links = [self._link(part, disk) for part in parts]
        node, depth = path[-1] if path else self.root, len(path) * BLOCK
        rest = self.chain.tokens(depth, min(depth + BLOCK, most))
        if rest and not self._layout.exact:
            closest, used = node.closest(rest)
            if closest is not None:
                parts.append(Part(closest, used))
                links.append(self._link(parts[-1], disk))
        resume = restorable(links, self._layout)
        if self._layout.exact:
            return self._with_tail(path, parts, links, resume, disk, most)
        return self._plan(parts, links, resume)

    def _with_tail(
        self, path: list[Node], parts: list[Part], links: list[Link], resume: int, disk: bool, most: int
    ) -> RestorePlan:
        """Where only the ends of blocks will do: the deepest tail beyond ``resume`` that begins what follows it."""
        for depth in range(len(path), resume // BLOCK - 1, -1):
            node = path[depth - 1] if depth else self.root
            rest = self.chain.tokens(depth * BLOCK, min(depth * BLOCK + BLOCK, most))
            for tail in reversed(list(node.tails(rest))):
                here = [*parts[:depth], Part(tail, len(tail.tokens) // TOKEN_BYTES)]
                linked = [*links[:depth], self._link(here[-1], disk)]
                if here[-1].end > resume and restorable(linked, self._layout) == here[-1].end:
                    return self._plan(here, linked, here[-1].end)
        return self._plan(parts, links, resume)

    def _plan(self, parts: list[Part], links: list[Link], resume: int) -> RestorePlan:
        if not resume:
            return NOTHING
        needs = tuple((parts[index].node, kind) for index, kind in needed(links, self._layout, resume))
        return RestorePlan(resume, tuple(part for part in parts if part.node.start < resume), needs)

    def _link(self, part: Part, disk: bool) -> Link:
        node, end = part.node, part.end
        held = node.records.keys() | node.disk.keys() if disk else node.records.keys()
        window_from = max(node.start, node.end - self._layout.window) if Kind.WINDOW in held else end
        return Link(node.start, end, Kind.KV in held, min(window_from, end), Kind.STATE in held and end == node.end)
