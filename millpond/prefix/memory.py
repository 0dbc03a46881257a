"""The RAM tier: which records are in memory, in the order in which they may go, within a byte budget.

Nodes with records in memory form one list by last use: a hit moves a whole path to the end, deepest first, and a new
block is put right before its parent. A node that cannot go, because a child of it is in memory or because it is pinned,
leaves the list when it is met at the old end, and comes back there once it can. The oldest node is therefore a leaf,
and evicting is O(1) whatever the pool's size and whoever waits for the disk. Engine thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice

from millpond.prefix.planner import Layout
from millpond.prefix.records import Kind, Payload
from millpond.prefix.tree import Node, Tree

NODE_BYTES = 1024
"""Charged for each node besides its arrays, so that blocks of models without keys and values are bounded too."""


class MemoryTier:
    """Bytes held and eviction. Whoever evicts decides what may go; see ``oldest``."""

    def __init__(self, tree: Tree, layout: Layout) -> None:
        self._tree = tree
        self._layout = layout
        self._ends = Node(b"", None, b"", 0)
        """Sentinel of the ring: ``newer`` of it is the oldest node, ``older`` of it the newest."""
        self._ends.newer = self._ends.older = self._ends
        self._spare: OrderedDict[Node, None] = OrderedDict()
        """Nodes whose window record is far from any known resume point: the first to go when memory is short."""
        self._snapshots: OrderedDict[Node, None] = OrderedDict()
        """Nodes with a snapshot of recurrent layers, by last use: long prompts leave many that nobody comes back to."""
        self.nbytes = 0
        self.blocks = 0
        self.snapshot_bytes = 0

    @property
    def snapshots(self) -> int:
        """How many there are."""
        return len(self._snapshots)

    # --- records ----------------------------------------------------------------------------------------------

    def put(self, node: Node, kind: Kind, payload: Payload) -> None:
        """Hold a record; one that is there already is replaced."""
        self.nbytes -= self._size(node)
        if not node.records:
            self._enter(node)
        before = node.records.get(kind)
        node.records[kind] = payload
        node.lost = False
        self.nbytes += self._size(node)
        if kind is Kind.STATE:
            self.snapshot_bytes += payload.nbytes - (0 if before is None else before.nbytes)
            self._snapshots[node] = None
        if kind is Kind.WINDOW:
            self._note_spare(node)

    def drop(self, node: Node, kinds: Iterable[Kind] | None = None) -> None:
        """Let records go, all unless told otherwise; the node goes too when nothing else keeps it."""
        held = bool(node.records)
        self.nbytes -= self._size(node)
        for kind in list(node.records) if kinds is None else kinds:
            payload = node.records.pop(kind, None)
            if kind is Kind.STATE and payload is not None:
                self.snapshot_bytes -= payload.nbytes
                del self._snapshots[node]
        if Kind.WINDOW not in node.records:
            self._spare.pop(node, None)
        self.nbytes += self._size(node)
        if held and not node.records:
            self._leave(node)
            self._tree.prune(node)

    def _size(self, node: Node) -> int:
        return NODE_BYTES + sum(payload.nbytes for payload in node.records.values()) if node.records else 0

    # --- order ------------------------------------------------------------------------------------------------

    def touch(self, path: list[Node]) -> None:
        """A chain of nodes, root side first, is used now; of their snapshots only the last."""
        if path:
            self._snapshot_used(path[-1])
        for node in reversed(path):
            node.lost = False
            if node.records:
                self._unlink(node)
                self._link(node, self._ends)

    def oldest(self, most: int) -> list[Node]:
        """Up to ``most`` evictable nodes, least recently used first: leaves in memory that nobody has pinned."""
        found: list[Node] = []
        node = self._ends.newer
        while node is not None and node is not self._ends and len(found) < most:
            following = node.newer
            if _free(node):
                found.append(node)
            else:
                self._unlink(node)
            node = following
        return found

    def unpinned(self, node: Node) -> None:
        """A pin was taken off this node."""
        self._bring_back(node)

    def resume_at(self, node: Node, now: float) -> None:
        """Requests will resume at the end of this node: the window records before it are not spare."""
        node.resume = now
        self._snapshot_used(node)
        here: Node | None = node
        for _ in range(self._layout.trail):
            if here is None:
                return
            self._spare.pop(here, None)
            here = here.parent

    def spare_windows(self) -> Node | None:
        """The node whose window record is the first to go, or None."""
        while self._spare:
            node = next(iter(self._spare))
            if node.pins == 0:
                return node
            self._spare.move_to_end(node)
            if next(iter(self._spare)).pins:
                return None
        return None

    def oldest_snapshots(self, most: int) -> list[Node]:
        """Up to ``most`` nodes that nobody has pinned, those whose snapshot was used least recently first."""
        return list(islice((node for node in self._snapshots if not node.pins), most))

    def _snapshot_used(self, node: Node) -> None:
        if node in self._snapshots:
            self._snapshots.move_to_end(node)

    def _note_spare(self, node: Node) -> None:
        """The block whose window just got out of reach of ``node`` becomes spare, unless something else may resume."""
        here: Node | None = node
        for _ in range(self._layout.trail):
            if here is None or here.resume is not None or len(here.children) > 1:
                return
            here = here.parent
        if here is not None and Kind.WINDOW in here.records and here.resume is None and len(here.children) <= 1:
            self._spare[here] = None

    def _enter(self, node: Node) -> None:
        parent = node.parent
        self.blocks += 1
        if parent is not None:
            parent.memory_children += 1
        self._link(node, parent if parent is not None and parent.newer is not None else self._ends)

    def _leave(self, node: Node) -> None:
        self.blocks -= 1
        self._unlink(node)
        if node.parent is not None:
            node.parent.memory_children -= 1
            self._bring_back(node.parent)

    def _bring_back(self, node: Node) -> None:
        """A node that left the list because it could not go is again the first to go, if now it can."""
        if node.records and node.newer is None and _free(node):
            assert self._ends.newer is not None
            self._link(node, self._ends.newer)

    def _link(self, node: Node, before: Node) -> None:
        """Put ``node``, which is not in the list, right before another (the sentinel: at the newest end)."""
        older = before.older
        assert older is not None
        node.older, node.newer = older, before
        older.newer = before.older = node

    def _unlink(self, node: Node) -> None:
        older, newer = node.older, node.newer
        if older is not None and newer is not None:
            older.newer, newer.older = newer, older
            node.older = node.newer = None


def _free(node: Node) -> bool:
    return node.memory_children == 0 and node.pins == 0
