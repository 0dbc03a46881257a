"""The whole prefix cache, driven at random beside a made-up and a real disk, against what was really stored."""

from __future__ import annotations

import queue
import shutil
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from prefix_support import LAYOUTS, NAMESPACE, blocks_of, check_memory, check_tree, fake, new_cache, watched_evictions

from millpond.prefix import eviction
from millpond.prefix.cache import PrefixCache
from millpond.prefix.disk.events import DiskEntry, Gone, Loaded, Opened, Saved, SsdEvent
from millpond.prefix.disk.tier import SsdTier
from millpond.prefix.eviction import LOOK_AT
from millpond.prefix.keys import TOKEN_BYTES
from millpond.prefix.match import RestorePlan
from millpond.prefix.planner import Layout
from millpond.prefix.query import End, PrefixQuery
from millpond.prefix.records import BLOCK, Kind, RecordHead, RecordId
from millpond.prefix.saver import UNDER_WAY_BYTES
from millpond.prefix.tree import Node
from millpond.settings import PrefixSettings, SavePolicy

LIMIT = 30_000
"""About a dozen blocks."""
GHOSTS = 8
FOREVER = 1e9
SALTS = st.sampled_from(["", "", "tenant"])


class MadeUpDisk:
    """A dict that answers when told to; what it lost is gone with all that depends on it, as with the real one."""

    def __init__(self) -> None:
        self.store: dict[RecordId, tuple[RecordHead, bytes]] = {}
        self.jobs: deque[tuple[str, object]] = deque()
        self.ids: list[RecordId] = []

    def read(self, head: RecordHead, ticket: int) -> None:
        self.jobs.append(("read", (head, ticket)))

    def write(self, head: RecordHead, payload: bytes) -> bool:
        self.jobs.append(("write", (head, payload)))
        return True

    def touch(self, ids: Sequence[RecordId]) -> None:
        self.ids = list(ids)

    def discard(self, ids: Sequence[RecordId]) -> None:
        assert ids
        self.jobs.append(("discard", list(ids)))

    def step(self, fails: bool) -> list[SsdEvent]:
        kind, job = self.jobs.popleft()
        if kind == "discard":
            return [Gone(self.lose(job))]  # type: ignore[arg-type]
        head, extra = job  # type: ignore[misc]
        if kind == "write":
            if fails:
                return [Saved(head.id, 0, "disk full")]
            self.store[head.id] = head, extra
            return [Saved(head.id, len(extra) + 100)]
        held = self.store.get(head.id)
        if held is None or fails:
            return [Loaded(extra, head.id, problem="damaged"), Gone(self.lose([head.id]))]
        assert (held[0].tokens, held[0].parent) == (head.tokens, head.parent)
        return [Loaded(extra, head.id, held[0].tensors, memoryview(held[1]), 0.001)]

    def lose(self, ids: Sequence[RecordId]) -> list[RecordId]:
        lost = set(ids)
        keys = {record.key for record in ids if record.kind is Kind.KV}
        while found := {
            r for r, (head, _) in self.store.items() if (head.parent in keys or r.key in keys) and r not in lost
        }:
            lost |= found
            keys |= {record.key for record in found}
        for record in lost:
            self.store.pop(record, None)
        return sorted(lost)

    def entries(self) -> list[DiskEntry]:
        return [
            DiskEntry(key=h.key, kind=h.kind, parent=h.parent, start=h.start, tokens=h.tokens, nbytes=len(p) + 100)
            for h, p in self.store.values()
        ]


class Machine(RuleBasedStateMachine):
    """Requests come, wait, run, and are stored; memory and disk give and take. The disk is made up."""

    policies = st.sampled_from(list(SavePolicy))

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[tuple[list[int], str, PrefixQuery]] = []
        self.texts: list[list[int]] = [[1]]
        self.fitted = LIMIT

    @initialize(name=st.sampled_from(list(LAYOUTS)), policy=policies)
    def begin(self, name: str, policy: SavePolicy) -> None:
        self.layout: Layout = LAYOUTS[name]
        self.policy = policy
        self.disk = self.new_disk()
        self.open()

    def new_disk(self) -> MadeUpDisk:
        return MadeUpDisk()

    def open(self) -> None:
        self.cache: PrefixCache = new_cache(self.layout, LIMIT)
        self.cache.attach(self.disk, self.policy, lambda start, tokens: FOREVER)
        self.cache.on_event(Opened(self.disk.entries()))
        self.watch = watched_evictions(self.cache)
        self.watch.__enter__()

    # --- requests ---------------------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        keep=st.one_of(st.integers(0, 300), st.sampled_from([63, 64, 65, 128])),
        more=st.one_of(st.integers(1, 150), st.sampled_from([1, 64, 65])),
        token=st.integers(0, 3),
        salt=SALTS,
    )
    def arrives(self, data: st.DataObject, keep: int, more: int, token: int, salt: str) -> None:
        text = data.draw(st.sampled_from(self.texts))[:keep] + [token] * more
        self.texts = [*self.texts[-5:], text]
        self.waiting.append((text, salt, self.cache.query(text, salt)))

    @precondition(lambda self: self.waiting)
    @rule(answer=st.sampled_from([0, 0, 1, 30, 70]), number=st.integers(0, 5), size=st.sampled_from([64, 64, 4000]))
    def runs(self, answer: int, number: int, size: int) -> None:
        """A waiting request is offered something; unless it waits for the disk it takes it and is stored."""
        text, salt, query = self.waiting[number % len(self.waiting)]
        now = FOREVER * number  # a deadline passes now and then
        offer = self.cache.offer(query, now)
        assert self.cache.offer(query, now) == offer
        if offer.held:
            return
        self.waiting.remove((text, salt, query))
        end, known = self.cache.explain(query, offer.position)
        assert offer.position <= len(text) - 1
        assert known >= 0
        assert (end is End.PROMPT) == (offer.position == len(text) - 1)
        assert (offer.wants is None) == (offer.position == len(text) - 1)
        hits = self.cache.counters.hits
        plan = self.cache.take(query, offer.position)
        assert plan.position == offer.position, "the number offered is the number restored"
        assert self.cache.counters.hits == hits + (plan.position > 0)
        self.backed(plan, text, salt)
        self.compute(query, text, salt, plan.position, answer, size)

    def backed(self, plan: RestorePlan, text: list[int], salt: str) -> None:
        """Every payload that the plan needs is the one that was stored for these very tokens (E3, E4)."""
        assert len(set(plan.needs)) == len(plan.needs)
        for node, kind in plan.needs:
            tokens = [*text[: node.start], *_unpack(node.tokens)]
            said = f"{salt}|{kind}|{node.start}|{','.join(map(str, tokens))}|".encode()
            assert node.records[kind].dump().startswith(said)
        if plan.position:
            ends = [part.end for part in plan.parts]
            assert ends[:-1] == list(range(BLOCK, ends[-1], BLOCK))
            assert ends[-1] == plan.position
            last = plan.parts[-1]
            assert text[last.node.start : last.end] == _unpack(last.node.tokens)[: last.used]

    def compute(self, query: PrefixQuery, text: list[int], salt: str, position: int, answer: int, size: int) -> None:
        """What the engine does: blocks of the prompt but its last token, its tail, then those of the answer."""
        for length, last in ((len(text) - 1, False), (len(text) + answer - 1, True)):
            tokens = [*text, *[9] * answer][:length]
            query.match.chain.extend(tokens)
            for begin, end in blocks_of(length, position) if answer or not last else ():
                kinds = [k for k in self.layout.kinds if k is not Kind.STATE or end == length or end % 128 == 0]
                wanted = self.cache.missing(query, begin, end, kinds)
                records = {kind: fake(salt, tokens[:end], begin, kind, size) for kind in wanted}
                self.cache.keep(query, begin, end, records)
            if length:
                self.cache.end_at(query, length, last)
            position = length

    @precondition(lambda self: self.waiting)
    @rule(number=st.integers(0, 5))
    def is_cancelled(self, number: int) -> None:
        self.waiting.pop(number % len(self.waiting))

    # --- memory and disk --------------------------------------------------------------------------------------

    @rule(room=st.sampled_from([0, 3000, 10_000, LIMIT, 10 * LIMIT]))
    def rows_need_memory(self, room: int) -> None:
        self.cache.fit(room)
        self.fitted = min(room, LIMIT)

    @rule()
    def housekeeps(self) -> None:
        self.cache.housekeep()

    @rule(steps=st.integers(1, 12), fails=st.sampled_from([False, False, False, True]))
    def disk_works(self, steps: int, fails: bool) -> None:
        for _ in range(min(steps, len(self.disk.jobs))):
            for event in self.disk.step(fails):
                self.cache.on_event(event)

    @precondition(lambda self: self.disk.store)
    @rule(number=st.integers(0, 50))
    def disk_loses(self, number: int) -> None:
        ids = sorted(self.disk.store)
        self.cache.on_event(Gone(self.disk.lose([ids[number % len(ids)]])))

    def settle(self) -> None:
        for _ in range(1000):
            self.cache.housekeep()
            if not self.disk.jobs:
                break
            self.disk_works(1, fails=False)
        else:
            raise AssertionError("it never ends")

    @rule()
    def all_is_quiet(self) -> None:
        """Nothing under way: nothing pinned, and the tree knows what the disk holds."""
        self.settle()
        assert not self.cache.saving
        assert all(node.pins == 0 for node in self.cache.tree.nodes())
        known = {RecordId(node.key, kind) for node in self.cache.tree.nodes() for kind in node.disk}
        assert known <= set(self.disk.store)
        lost = {r for r in self.disk.store if r not in known and self.cache.tree.get(self.disk.store[r][0].parent)}
        assert not lost, "on disk, its parent known, and forgotten"

    @rule(orderly=st.booleans())
    def restarts(self, orderly: bool) -> None:
        """All that was said to be saved is found again; after an orderly stop the last conversation is (F1)."""
        self.watch.__exit__(None, None, None)
        if orderly:
            self.cache.save_live()
            self.settle()
        self.disk.jobs.clear()
        self.waiting.clear()
        saved = {RecordId(node.key, kind) for node in self.cache.tree.nodes() for kind in node.disk}
        self.open()
        found = {RecordId(node.key, kind) for node in self.cache.tree.nodes() for kind in node.disk}
        assert found <= set(self.disk.store)
        assert {r for r in saved if self.rooted(r)} <= found
        self.fitted = LIMIT

    def rooted(self, record: RecordId) -> bool:
        while record in self.disk.store:
            head, _ = self.disk.store[record]
            if head.start == 0:
                return True
            record = RecordId(head.parent, Kind.KV)
        return False

    # --- what always holds ------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        check_tree(cache.tree)
        check_memory(cache)
        assert len(cache._evictor.ghosts) <= GHOSTS
        assert self.pinned() == cache._saver.under_way_bytes  # type: ignore[union-attr]
        excess = cache.nbytes - self.fitted
        if excess > 0:
            # Over the limit only while nothing may go: pinned, an ancestor of those, or not saved yet.
            free = cache._memory.oldest(LOOK_AT)
            assert excess <= UNDER_WAY_BYTES + self.pinned()
            if self.policy is SavePolicy.EVICTED and cache._saver.healthy:  # type: ignore[union-attr]
                assert not any(cache._saver.saved(node) for node in free)  # type: ignore[union-attr]
            else:
                assert not free

    def pinned(self) -> int:
        under_way = self.cache._saver._under_way  # type: ignore[union-attr]
        assert all(
            node.pins > 0 and node.alive and record.kind in node.records for record, (node, _) in under_way.items()
        )
        assert sum(node.pins for node in self.cache.tree.nodes()) == len(under_way)
        return sum(size for _, size in under_way.values())

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.all_is_quiet()
            self.watch.__exit__(None, None, None)


class RealDisk:
    """The SSD tier with the made-up disk's face: what it says is taken when the machine says so."""

    def __init__(self, folder: Path) -> None:
        self.events: queue.SimpleQueue[SsdEvent] = queue.SimpleQueue()
        self.tier = SsdTier(folder, NAMESPACE, PrefixSettings(cache_ssd=60_000, label="test"), self.events.put)
        self.tier.start()
        self.opened = self.events.get(timeout=30)


class RealMachine(Machine):
    """The same beside the real SSD tier in a folder, small enough to evict. Reads and writes end when they do."""

    def new_disk(self) -> MadeUpDisk:
        self.folder = Path(mkdtemp(prefix="millpond-machine-"))
        return MadeUpDisk()

    def open(self) -> None:
        self.real = RealDisk(self.folder)
        self.cache = new_cache(self.layout, LIMIT)
        self.cache.attach(self.real.tier, self.policy, lambda start, tokens: FOREVER)
        assert isinstance(self.real.opened, Opened)
        assert not self.real.opened.problem
        self.cache.on_event(self.real.opened)
        self.watch = watched_evictions(self.cache)
        self.watch.__enter__()

    def hear(self, seconds: float) -> bool:
        try:
            event = self.real.events.get(timeout=seconds) if seconds else self.real.events.get_nowait()
        except queue.Empty:
            return False
        self.cache.on_event(event)
        if isinstance(event, Loaded):
            self.real.tier.taken()
        return True

    @rule(steps=st.integers(1, 12))
    def disk_works(self, steps: int, fails: bool = False) -> None:
        for _ in range(steps):
            self.hear(0.002)

    @rule(number=st.integers(0, 50))
    def disk_loses(self, number: int) -> None:
        """A file is damaged, or gone, behind the tier's back."""
        files = sorted(path for path in self.folder.glob("????????????????/??/*") if path.is_file())
        if files and number % 2:
            files[number % len(files)].unlink(missing_ok=True)
        elif files:
            damaged = files[number % len(files)]
            try:
                content = damaged.read_bytes()
                damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if number % 4 else content[:-3])
            except FileNotFoundError:
                pass

    def settle(self) -> None:
        for _ in range(10_000):
            self.cache.housekeep()
            if self.cache.saving or self.cache._loader._reading:  # type: ignore[union-attr]
                assert self.hear(30.0), "an answer never came"
            elif not self.hear(0.0):  # the last thing said may leave more to save
                return
        raise AssertionError("it never ends")

    @rule()
    def all_is_quiet(self) -> None:
        self.settle()
        assert not self.cache.saving
        assert all(node.pins == 0 for node in self.cache.tree.nodes())

    @rule(orderly=st.booleans())
    def restarts(self, orderly: bool) -> None:
        """A new cache on the same folder; what was stored is served, and only to the same tokens (F1)."""
        self.watch.__exit__(None, None, None)
        if orderly:
            self.cache.save_live()
            self.settle()
        self.real.tier.close(30.0)
        self.waiting.clear()
        self.open()
        self.fitted = LIMIT

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.all_is_quiet()
            self.watch.__exit__(None, None, None)
            assert self.real.tier.close(30.0) or True
            shutil.rmtree(self.folder, ignore_errors=True)


def _unpack(tokens: bytes) -> list[int]:
    return [int.from_bytes(tokens[at : at + TOKEN_BYTES], "big") for at in range(0, len(tokens), TOKEN_BYTES)]


def run(machine: type[Machine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(autouse=True)
def few_ghosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "GHOSTS", GHOSTS)


def test_beside_a_made_up_disk() -> None:
    """Invariants of E3 to E6 and F7 after every step."""
    run(Machine, 100, 40)


def test_beside_a_real_disk() -> None:
    """The same with files, damaged and removed ones too (F1, F2)."""
    run(RealMachine, 10, 25)


@pytest.mark.slow
def test_beside_a_made_up_disk_for_long() -> None:
    run(Machine, 1500, 80)


@pytest.mark.slow
def test_beside_a_real_disk_for_long() -> None:
    run(RealMachine, 200, 50)


def test_what_waits_for_a_slow_disk_does_not_keep_memory() -> None:
    """The oldest conversations are being written and pinned; what comes after them goes in their place (E6)."""
    disk = MadeUpDisk()
    cache = new_cache(LAYOUTS["kv"], LIMIT)
    cache.attach(disk, SavePolicy.ALL, lambda start, tokens: FOREVER)

    def stores(prompt: int, blocks: int) -> None:
        query = cache.query([prompt] * (blocks * BLOCK + 1), "")
        for begin in range(0, blocks * BLOCK, BLOCK):
            cache.keep(query, begin, begin + BLOCK, {Kind.KV: fake("", [prompt], begin, Kind.KV)})

    stores(1, 20)
    cache.housekeep()
    pinned: list[Node] = [node for node in cache.tree.nodes() if node.pins]
    assert len(pinned) == 20
    for prompt in range(100, 150):
        stores(prompt, 2)
        assert cache.nbytes <= LIMIT
    assert all(node.alive and node.records for node in pinned)


class SmallDisk(MadeUpDisk):
    """Room for three records: the oldest go, and it says so."""

    def step(self, fails: bool) -> list[SsdEvent]:
        gone = self.lose(list(self.store)[:1]) if len(self.store) >= 3 and self.jobs[0][0] == "write" else []
        return [*([Gone(gone)] if gone else []), *super().step(fails)]


@pytest.mark.parametrize(("kind", "refuses"), [(MadeUpDisk, True), (SmallDisk, False)])
def test_what_the_disk_does_not_keep_is_not_written_for_ever(kind: type[MadeUpDisk], refuses: bool) -> None:
    """Memory is nearly full, and no request comes: what is saved ahead, and refused or dropped, is not tried again
    until one does (F7)."""
    disk, cache = kind(), new_cache(LAYOUTS["kv"], LIMIT)
    cache.attach(disk, SavePolicy.EVICTED, lambda start, tokens: FOREVER)

    def writes(fails: bool) -> int:
        count = 0
        for _ in range(1000):
            cache.housekeep()
            if not disk.jobs:
                return count
            count += disk.jobs[0][0] == "write"
            for event in disk.step(fails):
                cache.on_event(event)
        raise AssertionError("it never ends")

    prompt = 0

    def stores() -> None:
        nonlocal prompt
        prompt += 1
        query = cache.query([prompt] * (BLOCK + 1), "")
        cache.keep(query, 0, BLOCK, {Kind.KV: fake("", [prompt], 0, Kind.KV)})

    while not cache.saving:
        stores()
    assert 0 < writes(refuses) <= 2 * LOOK_AT
    for _ in range(5):
        stores()
        assert writes(refuses) <= LOOK_AT
    for _ in range(20):  # a disk that has recovered is given what is new
        stores()
        writes(fails=False)
    assert len(disk.store) >= 3


@pytest.mark.parametrize("selfcheck", [1, 2, 5])
def test_one_hit_in_so_many_is_checked(selfcheck: int) -> None:
    """Not every one after the first that is."""
    cache = new_cache(LAYOUTS["kv"], selfcheck=selfcheck)
    machine = Machine()
    machine.cache, machine.layout = cache, LAYOUTS["kv"]
    prompt = [1] * 200
    machine.compute(cache.query(prompt, ""), prompt, "", 0, 0, 64)
    checks = 0
    for _ in range(20):
        query = cache.query(prompt, "")
        offer = cache.offer(query, 0.0)
        checks += query.check
        assert offer.position == (0 if query.check else 199)
        cache.take(query, offer.position)
        machine.compute(query, prompt, "", offer.position, 0, 64)
    assert checks == 20 // selfcheck
    assert cache.counters.mismatches == 0
    assert cache.counters.checked == checks * 4
    assert cache.counters.hits == 20 - checks


def test_a_wrong_block_is_removed_from_disk_even_while_it_is_written() -> None:
    """Found by a self-check between its hand-over and the end of its write: the right one is stored instead."""
    disk = MadeUpDisk()
    cache = new_cache(LAYOUTS["kv"], selfcheck=1)
    cache.attach(disk, SavePolicy.ALL, lambda start, tokens: FOREVER)
    prompt = [1] * 65
    wrong = cache.query(prompt, "")
    cache.keep(wrong, 0, BLOCK, {Kind.KV: fake("", [0], 0, Kind.KV)})
    cache.housekeep()
    checked = cache.query(prompt, "")
    assert cache.offer(checked, 0.0).position == 0
    assert cache.explain(checked, 0)[0] is End.SELFCHECK
    cache.take(checked, 0)
    cache.keep(checked, 0, BLOCK, {Kind.KV: fake("", prompt[:64], 0, Kind.KV)})
    assert cache.counters.mismatches == 1
    for _ in range(5):
        while disk.jobs:
            for event in disk.step(fails=False):
                cache.on_event(event)
        cache.housekeep()
    ((_, payload),) = disk.store.values()
    assert payload == fake("", prompt[:64], 0, Kind.KV).data
    (node,) = cache.tree.nodes()
    assert set(node.disk) == {Kind.KV}
    assert node.pins == 0


def test_blocks_read_in_vain_are_not_read_for_ever() -> None:
    """Memory is too short to hold what was read: the request goes on without, instead of reading it again (F8)."""
    disk = MadeUpDisk()
    cache = new_cache(LAYOUTS["kv"])
    cache.attach(disk, SavePolicy.ALL, lambda start, tokens: FOREVER)
    machine = Machine()
    machine.cache, machine.layout = cache, LAYOUTS["kv"]
    prompt = [1] * 200
    machine.compute(cache.query(prompt, ""), prompt, "", 0, 0, 64)
    cache.housekeep()
    while disk.jobs:
        for event in disk.step(fails=False):
            cache.on_event(event)
    cache.fit(0)
    query = cache.query(prompt, "")
    for _ in range(5):
        if not cache.offer(query, 0.0).held:
            break
        while disk.jobs:
            for event in disk.step(fails=False):
                cache.on_event(event)
        cache.fit(0)
    else:
        raise AssertionError("it reads the same blocks again and again")
    assert cache.offer(query, 0.0).position == 0


@pytest.mark.parametrize("cancelled", [False, True])
def test_reads_share_the_room_for_what_was_read(cancelled: bool) -> None:
    """Two prompts that do not fit beside each other: the second is read when the first has begun, or has gone."""
    disk = MadeUpDisk()
    cache = new_cache(LAYOUTS["kv"], LIMIT)
    cache.attach(disk, SavePolicy.ALL, lambda start, tokens: FOREVER)
    machine = Machine()
    machine.cache, machine.layout, machine.disk = cache, LAYOUTS["kv"], disk
    prompts = [[number] * 257 for number in (1, 2)]
    for tokens in prompts:
        machine.compute(cache.query(tokens, ""), tokens, "", 0, 0, 2500)
        machine.settle()
    cache.fit(0)
    cache.fit(LIMIT)
    queries = [cache.query(tokens, "") for tokens in prompts]
    assert [cache.offer(query, 0.0).held for query in queries] == [True, True]
    machine.settle()
    assert cache.offer(queries[1], 0.0).held
    assert cache.blocks == 4
    if cancelled:
        del queries[0]
    else:
        assert cache.offer(queries[0], 0.0).position == 256
        cache.take(queries[0], 256)
    assert cache.offer(queries[-1], 0.0).held
    machine.settle()
    assert cache.offer(queries[-1], 0.0).position == 256


def test_a_record_that_cannot_be_used_is_a_miss() -> None:
    """An element type this version does not have: counted as damage, never an exception in the engine (F2)."""
    disk = MadeUpDisk()
    cache = PrefixCache(NAMESPACE, LAYOUTS["kv"], LIMIT, _refuses, lambda a, b: True)
    cache.attach(disk, SavePolicy.ALL, lambda start, tokens: FOREVER)
    machine = Machine()
    machine.cache, machine.layout = cache, LAYOUTS["kv"]
    prompt = [1] * 65
    machine.compute(cache.query(prompt, ""), prompt, "", 0, 0, 64)
    cache.housekeep()
    while disk.jobs:
        for event in disk.step(fails=False):
            cache.on_event(event)
    cache.fit(0)
    cache.fit(LIMIT)
    query = cache.query(prompt, "")
    assert cache.offer(query, 0.0).held
    while disk.jobs:
        for event in disk.step(fails=False):
            cache.on_event(event)
    assert cache.offer(query, 0.0).position == 0
    assert not cache.offer(query, 0.0).held


def _refuses(tensors: object, payload: object) -> object:
    raise ValueError("'float12' is not an element type")


def test_the_measuring_read_serves_those_who_want_its_record() -> None:
    """The first request after a start may want the very record with which the disk's speed is being measured."""
    disk = MadeUpDisk()
    machine = Machine()
    machine.layout = LAYOUTS["kv"]
    prompt = [1] * 65
    for start in ("first", "second"):
        machine.cache = cache = new_cache(LAYOUTS["kv"])
        cache.attach(disk, SavePolicy.ALL, lambda start, tokens: FOREVER)
        cache.on_event(Opened(disk.entries()))
        query = cache.query(prompt, "")
        if start == "first":
            machine.compute(query, prompt, "", 0, 0, 64)
            cache.housekeep()
            disk.step(fails=False)
        else:
            assert cache.offer(query, 0.0).held
            for event in disk.step(fails=False):
                cache.on_event(event)
            assert cache.offer(query, 0.0).position == 64
