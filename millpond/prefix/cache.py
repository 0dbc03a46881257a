"""The prefix cache as the engine uses it: what is known of a sequence, what to restore, what to keep.

Engine thread only. Nothing here waits: the SSD tier answers with events. Memory never holds more than its limit, except
for at most saver.UNDER_WAY_BYTES of records that the policy wants on disk before they may go.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from weakref import WeakSet

from millpond.observe.log import fields
from millpond.prefix.disk.events import DiskEntry, Found, Gone, Loaded, Opened, Saved, SsdEvent
from millpond.prefix.eviction import Evictor
from millpond.prefix.keys import TOKEN_BYTES
from millpond.prefix.loader import Loader
from millpond.prefix.match import NOTHING, Match, RestorePlan
from millpond.prefix.memory import MemoryTier
from millpond.prefix.planner import Layout
from millpond.prefix.query import End, Offer, PrefixQuery
from millpond.prefix.records import BLOCK, Kind, Payload, RecordId, Tensor
from millpond.prefix.saver import Disk, Saver
from millpond.prefix.tree import BLOCK_BYTES, Node, Tree
from millpond.settings import SavePolicy
from millpond.types import PrefixCounters

log = logging.getLogger(__name__)


USED_TOKENS = BLOCK // 2
"""A block of which a request has restored fewer tokens has not been used by it, as far as the disk is concerned."""
LIVE_SECONDS = 1800.0
"""A conversation used this recently is live: an orderly stop saves it, whatever the policy but off."""


class PrefixCache:
    """``make`` turns what was read from disk into a payload; ``same`` tells whether two payloads agree."""

    def __init__(
        self,
        namespace: str,
        layout: Layout,
        limit_bytes: int,
        make: Callable[[Sequence[Tensor], memoryview], Payload],
        same: Callable[[Payload, Payload], bool],
        selfcheck: int = 0,
    ) -> None:
        self.layout = layout
        self.limit_bytes = limit_bytes
        self.counters = PrefixCounters()
        self._make = make
        self._same = same
        self._selfcheck = selfcheck
        self._tree = Tree(namespace)
        self._memory = MemoryTier(self._tree, layout)
        self._evictor = Evictor(self._memory, self.counters)
        self._fetching: WeakSet[PrefixQuery] = WeakSet()
        """Waiting requests for which records are being, or have been, read from disk."""
        self._room = limit_bytes
        """What rows and prompts leave, as of the last ``fit``."""
        self._version = 0
        self._asked = 0
        """Requests that found something cached; every so many of them is checked."""
        self._disk: Disk | None = None
        self._saver: Saver | None = None
        self._loader: Loader | None = None

    def attach(self, disk: Disk, policy: SavePolicy, prefill_seconds: Callable[[int, int], float]) -> None:
        """Use an SSD tier whose events will come through ``on_event``."""
        self._disk = disk
        self._saver = Saver(disk, policy)
        self._loader = Loader(disk, prefill_seconds)

    # --- what there is ----------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self._memory.nbytes

    @property
    def blocks(self) -> int:
        """Blocks with records in memory."""
        return self._memory.blocks

    @property
    def snapshots(self) -> int:
        """Snapshots of recurrent layers in memory."""
        return self._memory.snapshots

    @property
    def snapshot_bytes(self) -> int:
        """Their bytes."""
        return self._memory.snapshot_bytes

    @property
    def tree(self) -> Tree:
        return self._tree

    # --- requests ---------------------------------------------------------------------------------------------

    def query(self, tokens: Sequence[int], salt: str) -> PrefixQuery:
        """Begin with a new request."""
        return PrefixQuery(Match(self._tree.root(salt), tokens, self.layout))

    def offer(self, query: PrefixQuery, now: float) -> Offer:
        """What can be restored for a request that has not begun; starts reading from disk what is worth it."""
        if query.seen is not None:
            version, offer = query.seen
            # One that waits for the disk is planned for again when all has come, not with each of a thousand blocks.
            if offer.held and query.load is not None and query.load.waits(now):
                return offer
            if version == self._version and not offer.held:
                return offer
        plan = self.plan(query, disk=False)
        held = self._fetch(query, plan, now)
        if plan.position and not held and not query.asked:
            query.asked = True
            self._asked += 1
            query.check = self._selfcheck > 0 and self._asked % self._selfcheck == 0
        position = 0 if query.check else plan.position
        offer = Offer(position, None if query.check else self.wants(query, position), held)
        query.seen = self._version, offer
        return offer

    def plan(self, query: PrefixQuery, disk: bool) -> RestorePlan:
        """The best position to resume with what is in memory, or with what is on disk as well."""
        version, plan = query.planned.get(disk, (-1, NOTHING))
        if version != self._version:
            plan = query.match.plan(disk)
            query.planned[disk] = self._version, plan
        return plan

    def wants(self, query: PrefixQuery, position: int) -> bytes | None:
        """Key of the block that a request at ``position`` computes next; None when only its last token is left."""
        limit = query.match.limit // self.layout.step * self.layout.step
        start = position // BLOCK * BLOCK
        return query.match.chain.key(start, min(start + BLOCK, limit)) if position < limit else None

    def take(self, query: PrefixQuery, position: int) -> RestorePlan:
        """Use the cached prefix up to ``position``, which was offered just now. Call it before anything is evicted."""
        plan = NOTHING if position == 0 else self.plan(query, disk=False)
        if plan.position != position:
            raise LookupError(f"{position} tokens were offered, {plan.position} are there")
        self._fetching.discard(query)
        counted = self.counters
        if plan.position:
            counted.hits += 1
            from_disk = sum(part.used for part in plan.parts if part.node.key in query.loaded)
            counted.disk_hits += from_disk > 0
            counted.disk_tokens += from_disk
            counted.memory_tokens += plan.position - from_disk
            self._touch(plan)
        else:
            counted.misses += 1
        return plan

    def will_return(self, query: PrefixQuery) -> None:
        """What was computed of a request is lost, and it needs its blocks again soon: others go before them."""
        self._memory.touch(query.match.follow())

    def explain(self, query: PrefixQuery, position: int) -> tuple[End, int]:
        """Why the cached prefix ends at ``position``, and how many leading tokens are known at all."""
        match = query.match
        path = match.follow()
        node = path[-1] if path else match.root
        rest = match.chain.tokens(match.depth, min(match.depth + BLOCK, match.limit))
        follows, shared = node.closest(rest) if rest else (None, 0)
        reached = match.depth + shared
        if query.check:
            return End.SELFCHECK, reached
        if position == match.limit:
            return End.PROMPT, reached
        refused = query.refused
        if refused is End.DAMAGED or (refused is not None and self.plan(query, disk=True).position > position):
            return refused, reached
        if position < reached:
            return End.ANOTHER_RANK if match.ceiling < reached else End.NOT_RESTORABLE, reached
        if len(rest) == BLOCK_BYTES and match.chain.key(match.depth, match.depth + BLOCK) in self._evictor.ghosts:
            return End.EVICTED, reached
        if follows is None and not len(self._tree):
            return End.EMPTY, reached
        return End.DIFFERS, reached

    # --- keeping ----------------------------------------------------------------------------------------------

    def missing(
        self, query: PrefixQuery, start: int, end: int, kinds: Iterable[Kind], *, behind_new: bool = False
    ) -> list[Kind]:
        """Which of these records of the block [start, end) are worth making: not in memory yet, or to be compared.
        ``behind_new``: the block before it is being made, and will be kept first."""
        node, parent = self._tree.get(query.match.chain.key(start, end)), self._parent(query, start)
        if node is None and parent is None and not behind_new:
            return []
        if node is None and parent is not None and self._covered(parent, query.match.chain.tokens(start, end)):
            return []
        return [kind for kind in kinds if node is None or query.check or kind not in node.records]

    def keep(self, query: PrefixQuery, start: int, end: int, records: Mapping[Kind, Payload]) -> None:
        """Hold records of the block [start, end) of a sequence; ``start`` on the block grid."""
        parent = self._parent(query, start)
        if parent is None or not records:
            return
        self._version += 1
        node = self._tree.add(parent, query.match.chain.tokens(start, end))
        self._evictor.ghosts.pop(node.key, None)
        if query.check and not self._agrees(node, records):
            self._distrust(node)
        for kind, payload in records.items():
            if query.check or kind not in node.records:
                self._memory.put(node, kind, payload)
        if self._saver is not None and self._saver.policy is SavePolicy.ALL and node.full:
            self._saver.want(node, (Kind.KV, Kind.STATE))
        if node.full and not self.layout.exact:
            self._supersede(parent, node)
        self.fit(self._room)

    def end_at(self, query: PrefixQuery, end: int, last: bool) -> None:
        """A prompt or (``last``) an answer ends at this position: requests will resume there."""
        start = (end - 1) // BLOCK * BLOCK
        node = self._tree.get(query.match.chain.key(start, end))
        if node is None and not self.layout.exact and (parent := self._parent(query, start)) is not None:
            node = parent.closest(query.match.chain.tokens(start, end))[0]
        if node is None:
            return
        self._memory.resume_at(node, time.monotonic())
        self._memory.touch(node.line())
        # A resume point of recurrent layers is nowhere else; any other tail is part of what the answer ends with.
        worth = node.full or last or self.layout.exact
        if self._saver is not None and self._saver.policy is SavePolicy.ALL and worth:
            self._saver.want(node, (Kind.KV, Kind.STATE))
            for step in node.line(self.layout.trail):
                self._saver.want(step, (Kind.WINDOW,))

    def fit(self, limit_bytes: int) -> None:
        """Evict until at most this many bytes, and never more than the cache's own limit, are held."""
        self._room = max(0, min(limit_bytes, self.limit_bytes))
        self._evict()

    def housekeep(self) -> None:
        """Hand what waits to the disk; call it once per turn of the engine."""
        if self._saver is not None:
            self._saver.pump()

    def patience(self, now: float) -> float | None:
        """Seconds until the first request that waits for the disk goes on without it; None when nobody waits."""
        deadline = self._loader.deadline(now) if self._loader is not None else None
        return None if deadline is None else deadline - now

    # --- the disk ---------------------------------------------------------------------------------------------

    def on_event(self, event: SsdEvent) -> None:
        """The SSD tier has something to say."""
        self._version += 1
        match event:
            case Opened(entries, _):
                self._learn(entries)
                if self._loader is not None:
                    self._loader.measure(entries)
            case Found(entries):
                self._learn(entries)
            case Loaded():
                self._arrived(event)
            case Saved(record, nbytes, problem):
                self._saved(record, nbytes, problem)
            case Gone(ids):
                for record in ids:
                    self._gone(record)

    def save_live(self) -> None:
        """Queue what an orderly stop should keep: live conversations, and with the policy ``evicted`` everything."""
        if self._saver is None:
            return
        since = time.monotonic() - LIVE_SECONDS
        everything = self._saver.policy in (SavePolicy.EVICTED, SavePolicy.ALL)
        ends = [node for node in self._tree.nodes() if everything or (node.resume is not None and node.resume >= since)]
        for node in sorted(ends, key=lambda node: -(node.resume or 0.0)):
            self._saver.want(node, (Kind.KV, Kind.STATE))
            if node.resume is not None:
                for step in node.line(self.layout.trail):
                    self._saver.want(step, (Kind.WINDOW,))

    @property
    def saving(self) -> bool:
        """Whether anything is still to be written."""
        return self._saver is not None and self._saver.busy

    @property
    def saving_load(self) -> tuple[int, int]:
        """How many records are still to be written, and the bytes that the disk has been given and not yet written."""
        return (self._saver.records, self._saver.under_way_bytes) if self._saver is not None else (0, 0)

    def _fetch(self, query: PrefixQuery, plan: RestorePlan, now: float) -> bool:
        """Whether the request should wait for the disk; starts reading when it should."""
        if self._loader is None or query.refused is not None:
            return False
        if query.load is not None:
            if query.load.waits(now):
                return True
            if query.load.waiting or query.load.failed:
                query.refused = End.DAMAGED if query.load.failed else End.SLOWER
            query.load = None
            return self._fetch(query, plan, now)
        more = self.plan(query, disk=True)
        needs = _absent(more)
        if more.position <= plan.position or not needs:
            return False
        if any(node.key in query.loaded for node, _ in needs):
            query.refused = End.EVICTED  # it was read, and memory was too short to hold it until now
            return False
        room = self.limit_bytes // 2
        more, needs = _within(room - query.fetched_bytes, query.match, more, needs)
        if more.position <= plan.position:
            query.refused = End.MEMORY
            return False
        if not self._loader.pays(needs, plan.position, more.position):
            query.refused = End.SLOWER
            return False
        nbytes = _bytes_on_disk(needs)
        if nbytes + sum(other.fetched_bytes for other in self._fetching) > room:
            return query not in self._fetching  # what others have had read would be evicted before they can use it
        query.target = more
        query.load = self._loader.load(needs, plan.position, more.position, now)
        query.loaded.update(node.key for node, kind in needs if kind is not Kind.WINDOW)
        query.fetched_bytes += nbytes
        self._fetching.add(query)
        return True

    def _learn(self, entries: Iterable[DiskEntry]) -> None:
        for entry in sorted(entries, key=lambda entry: entry.start):
            parent = self._tree.parent_of(entry.parent, entry.start)
            if parent is not None and entry.nbytes > 0:
                self._tree.add(parent, entry.tokens).disk[entry.kind] = entry.nbytes

    def _arrived(self, event: Loaded) -> None:
        assert self._loader is not None
        node = self._tree.get(event.id.key)
        problem = event.problem
        wanted = self._loader.awaited(event.id)
        if event.payload is not None and node is not None and wanted and event.id.kind not in node.records:
            try:
                self._memory.put(node, event.id.kind, self._make(event.tensors, event.payload))
            except ValueError as error:
                problem = str(error)
                log.warning("a record on disk cannot be used", extra=fields(error=error))
        if problem and node is not None:
            node.disk.pop(event.id.kind, None)
            self._tree.prune(node)
        nbytes = event.payload.nbytes if event.payload is not None else 0
        self._loader.arrived(event.id, nbytes, event.seconds, problem)
        self.fit(self._room)

    def _saved(self, record: RecordId, nbytes: int, problem: str) -> None:
        assert self._saver is not None
        node = self._saver.written(record, nbytes, problem)
        if node is not None:
            self._memory.unpinned(node)
            self._tree.prune(node)
        self._evict(ahead=not problem)

    def _gone(self, record: RecordId) -> None:
        node = self._tree.get(record.key)
        if node is not None and node.disk.pop(record.kind, None) is not None:
            node.lost = True
            if not node.records and not node.disk:
                self._evictor.remember(node)
            self._tree.prune(node)

    # --- inside -----------------------------------------------------------------------------------------------

    def _evict(self, *, ahead: bool = True) -> None:
        if self._evictor.fit(self._room, self._saver, ahead=ahead):
            self._version += 1

    def _parent(self, query: PrefixQuery, start: int) -> Node | None:
        """The block before [start, ...); None when it is no longer known, and what follows would never be found."""
        if start == 0:
            return query.match.root
        return self._tree.get(query.match.chain.key(start - BLOCK, start))

    def _covered(self, parent: Node, tail: bytes) -> bool:
        """Whether a block in memory begins with these tokens and can be resumed behind them."""
        node, shared = parent.closest(tail)
        return not self.layout.exact and shared * TOKEN_BYTES == len(tail) and node is not None and bool(node.records)

    def _touch(self, plan: RestorePlan) -> None:
        self._memory.touch([part.node for part in plan.parts])
        if self._disk is not None:
            self._disk.touch([RecordId(node.key, kind) for node, kind in plan.needs if kind in node.disk])
        if self._saver is not None and self._saver.policy in (SavePolicy.SECOND_USE, SavePolicy.ALL):
            used = {part.node: part.used for part in plan.parts}
            for node, kind in plan.needs:
                if used[node] >= USED_TOKENS or used[node] == node.end - node.start:
                    self._saver.want(node, (kind,))

    def _agrees(self, node: Node, records: Mapping[Kind, Payload]) -> bool:
        self.counters.checked += any(kind in node.records for kind in records)
        held = ((node.records[kind], payload) for kind, payload in records.items() if kind in node.records)
        return all(self._same(old, new) for old, new in held)

    def _distrust(self, node: Node) -> None:
        """What was cached is not what this prompt gives: it goes, from disk as well, before anybody else uses it."""
        self.counters.mismatches += 1
        log.error(
            "a cached block differs from its recomputation", extra=fields(start=node.start, block=node.key.hex()[:16])
        )
        # What follows it may have been computed from it.
        tainted = [node]
        for each in tainted:
            tainted += each.children.values()
        for each in reversed(tainted):
            if self._saver is not None:
                self._saver.discard(each)
            if each is not node and each.pins == 0:
                self._memory.drop(each)
                self._tree.prune(each)

    def _supersede(self, parent: Node, full: Node) -> None:
        """A tail that a full block begins with holds nothing that the block does not."""
        for tail in list(parent.tails(full.tokens)):
            if tail.pins == 0:
                if self._saver is not None and full.disk.keys() >= tail.disk.keys():
                    self._saver.discard(tail)
                self._memory.drop(tail)
                self._tree.prune(tail)


Needs = Sequence[tuple[Node, Kind]]
"""Records to read from disk, in order of position."""


def _absent(plan: RestorePlan) -> Needs:
    """What of a plan is not in memory."""
    return [(node, kind) for node, kind in plan.needs if kind not in node.records]


def _bytes_on_disk(needs: Needs) -> int:
    return sum(node.disk[kind] for node, kind in needs)


def _within(room: int, match: Match, plan: RestorePlan, needs: Needs) -> tuple[RestorePlan, Needs]:
    """The plan and what it needs, or one that goes less far and needs at most ``room`` bytes."""
    while needs and (excess := _bytes_on_disk(needs) - room) > 0:
        most = plan.position
        for node, kind in reversed(needs):
            most, excess = node.start, excess - node.disk[kind]
            if excess <= 0:
                break
        plan = match.plan(disk=True, most=most)
        needs = _absent(plan)
    return plan, needs
