"""What of a sequence would be restored, against a plain list of what was stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_support import LAYOUTS, NAMESPACE, Fake, blocks_of, fake, new_cache, store

from millpond.prefix import keys, match
from millpond.prefix.cache import PrefixCache
from millpond.prefix.keys import TOKEN_BYTES, pack
from millpond.prefix.match import Match, RestorePlan
from millpond.prefix.planner import Layout
from millpond.prefix.records import BLOCK, Kind
from millpond.prefix.tree import BLOCK_BYTES, Node, Tree

Held = dict[tuple[tuple[int, ...], Kind], bool]
"""Records by all tokens up to their end; whether they are in memory (else on disk)."""

lengths = st.one_of(st.integers(1, 230), st.sampled_from([63, 64, 65, 127, 128, 129, 192]))


@st.composite
def sequences(draw: st.DrawFn) -> list[list[int]]:
    """A few prompts that share beginnings."""
    found: list[list[int]] = []
    for number in range(draw(st.integers(1, 5))):
        kept = draw(st.sampled_from(found))[: draw(lengths)] if found else []
        found.append(kept + [number] * draw(lengths))
    return found


@st.composite
def situations(draw: st.DrawFn) -> tuple[Layout, list[list[int]], Held, list[int]]:
    layout = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
    stored = draw(sequences())
    held: Held = {}
    for tokens in stored:
        for _, end in blocks_of(len(tokens)):
            for kind in layout.kinds:
                if draw(st.integers(0, 9)):
                    held[tuple(tokens[:end]), kind] = bool(draw(st.integers(0, 3)))
    query = draw(st.sampled_from(stored))[: draw(lengths)] + [9] * draw(st.integers(0, 70))
    return layout, stored, held, query or [9]


def planted(layout: Layout, held: Held) -> Tree:
    tree = Tree(NAMESPACE)
    for (tokens, kind), memory in sorted(held.items(), key=lambda item: len(item[0][0])):
        node = tree.root("")
        for begin, end in blocks_of(len(tokens)):
            node = tree.add(node, pack(tokens[begin:end]))
        if memory:
            node.records[kind] = Fake(b"x")
        else:
            node.disk[kind] = 1
    return tree


def backed(plan: RestorePlan, layout: Layout, query: Sequence[int], held: Held, disk: bool) -> None:
    """Assert that everything a restore of this plan reads was stored for these very tokens (E3, E4, E7)."""
    position = plan.position
    assert [part.node.start for part in plan.parts] == list(range(0, position, BLOCK))
    assert plan.parts[-1].end == position
    for part in plan.parts:
        start = part.node.start
        assert part.used <= len(part.node.tokens) // TOKEN_BYTES
        assert pack(query[start : part.end]) == part.node.tokens[: part.used * TOKEN_BYTES]
    names = {part.node: (*query[: part.node.start], *_unpack(part.node.tokens)) for part in plan.parts}
    assert len(set(plan.needs)) == len(plan.needs), "a block is returned once"
    for node, kind in plan.needs:
        assert held.get((names[node], kind), False) or (disk and (names[node], kind) in held)
    read = set(plan.needs)
    assert {(part.node, Kind.KV) for part in plan.parts} <= read
    if layout.window:
        seen: set[int] = set()
        for part in plan.parts:
            if (part.node, Kind.WINDOW) in read:
                seen |= set(range(max(part.node.start, part.node.end - layout.window), part.end))
        assert set(range(max(0, position - layout.window + 1), position)) <= seen
    if layout.state:
        last = plan.parts[-1]
        assert last.end == last.node.end
        assert (last.node, Kind.STATE) in read


def _unpack(tokens: bytes) -> list[int]:
    return [int.from_bytes(tokens[at : at + TOKEN_BYTES], "big") for at in range(0, len(tokens), TOKEN_BYTES)]


@settings(max_examples=200, deadline=None)
@given(situations())
def test_a_claim_is_backed_by_records(situation: tuple[Layout, list[list[int]], Held, list[int]]) -> None:
    """Never beyond what there is; with the disk at least as much as without (E3)."""
    layout, _, held, query = situation
    tree = planted(layout, held)
    both = Match(tree.root(""), query, layout)
    memory, disk = both.plan(disk=False), both.plan(disk=True)
    assert memory.position <= disk.position <= len(query) - 1
    for plan, with_disk in ((memory, False), (disk, True)):
        if plan.position:
            backed(plan, layout, query, held, with_disk)
        else:
            assert (plan.parts, plan.needs) == ((), ())
    assert Match(tree.root("other"), query, layout).plan(disk=True).position == 0


@settings(max_examples=200, deadline=None)
@given(situations(), st.sampled_from([64, 128]))
def test_in_steps_the_last_whole_one_that_can_be_resumed(
    situation: tuple[Layout, list[list[int]], Held, list[int]], step: int
) -> None:
    """Neither one beyond it nor one too few: of all multiples, the largest that a plan up to it reaches."""
    layout, _, held, query = situation
    tree = planted(layout, held)
    for disk in (False, True):
        reached = [0]
        for ceiling in range(step, len(query), step):
            match = Match(tree.root(""), query, layout)
            match.ceiling = ceiling
            reached += [ceiling] if match.plan(disk).position == ceiling else []
        plan = Match(tree.root(""), query, replace(layout, step=step)).plan(disk)
        assert plan.position == max(reached)
        if plan.position:
            backed(plan, layout, query, held, disk)


@settings(max_examples=100, deadline=None)
@given(sequences(), st.sampled_from(list(LAYOUTS)), lengths, st.integers(0, 70))
def test_with_everything_stored_nothing_is_missed(stored: list[list[int]], name: str, length: int, more: int) -> None:
    """The longest common prefix, down to the token where layers allow it, else to the end of a stored block (E3)."""
    layout = LAYOUTS[name]
    cache = new_cache(layout)
    for tokens in stored:
        store(cache, cache.query([*tokens, 0], ""), tokens, states=range(0, 400, BLOCK))
    query = stored[-1][:length] + [9] * (more + 1)
    plan = cache.query(query, "").match.plan(disk=False)
    limit = len(query) - 1
    best = 0
    for tokens in stored:
        shared = next((at for at in range(min(len(tokens), limit)) if tokens[at] != query[at]), min(len(tokens), limit))
        if layout.exact and shared < len(tokens):
            shared = shared // BLOCK * BLOCK
        best = max(best, shared)
    assert plan.position == best


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("length", [2, 17, 64, 65, 66, 129, 200])
def test_a_full_hit_leaves_exactly_one_token(name: str, length: int) -> None:
    """The prompt is stored as the engine does, up to its last token, which is computed again (E3)."""
    cache = new_cache(LAYOUTS[name])
    prompt = list(range(length))
    first = cache.query(prompt, "")
    store(cache, first, prompt[:-1])
    again = cache.query(prompt, "")
    assert cache.offer(again, 0.0).position == length - 1
    assert cache.wants(again, length - 1) is None
    assert cache.take(again, length - 1).position == length - 1
    longer = cache.query([*prompt[:-1], 9999, 9999], "")
    assert longer.match.plan(disk=False).position == length - 1
    one = cache.query(prompt[:1], "")
    assert cache.offer(one, 0.0).position == 0


def test_a_path_that_lost_its_end_is_found_again() -> None:
    """Blocks that go and come back while a request waits are seen as they are."""
    cache = new_cache(LAYOUTS["kv"])
    prompt = list(range(200))
    store(cache, cache.query(prompt, ""), prompt)
    waiting = cache.query(prompt, "")
    assert waiting.match.plan(disk=False).position == 199
    cache.fit(0)
    assert waiting.match.plan(disk=False).position == 0
    cache.fit(1 << 20)
    store(cache, cache.query(prompt, ""), prompt)
    assert waiting.match.plan(disk=False).position == 199


def test_of_two_that_share_as_much_the_one_in_memory_is_claimed() -> None:
    tree = Tree(NAMESPACE)
    for token in (1, 3):
        node = tree.add(tree.root(""), pack([7] * 10 + [token]))
        (node.records if token == 1 else node.disk).__setitem__(Kind.KV, Fake(b"x") if token == 1 else 1)  # type: ignore[call-overload]
    found = Match(tree.root(""), [7] * 10 + [2, 2, 2], LAYOUTS["kv"])
    assert (found.plan(disk=False).position, found.plan(disk=True).position) == (10, 10)


# --- cost --------------------------------------------------------------------------------------------------------


class Counted:
    """Counts the bytes that are hashed or compared, and the nodes looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hashed = self.looked = self.packed = 0
        sha256, child, closest, packing = hashlib.sha256, Node.child, Node.closest, keys.pack

        def counting_hash(data: bytes) -> object:
            self.hashed += len(data)
            return sha256(data)

        def counting_child(node: Node, tokens: bytes) -> Node | None:
            self.looked += 1
            return child(node, tokens)

        def counting_closest(node: Node, tokens: bytes) -> tuple[Node | None, int]:
            self.looked += 1
            return closest(node, tokens)

        def counting_pack(tokens: Sequence[int]) -> bytes:
            self.packed += len(tokens)
            return packing(tokens)

        monkeypatch.setattr(keys.hashlib, "sha256", counting_hash)
        monkeypatch.setattr(Node, "child", counting_child)
        monkeypatch.setattr(Node, "closest", counting_closest)
        monkeypatch.setattr(match, "pack", counting_pack)


@pytest.mark.parametrize("name", ["kv", "state"])
def test_looking_up_a_long_prompt_costs_its_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """32k tokens: each is packed once, nothing is hashed but for the wanted block, each block is looked at once (E5).

    The same question again costs nothing, and other prompts in the cache make no difference.
    """
    blocks = 512
    cache = new_cache(LAYOUTS[name], 1 << 30)
    prompt = [index % 50_000 for index in range(blocks * BLOCK)]
    for other in range(300):
        store(cache, cache.query([other], ""), [60_000 + other] * 20)
    writer = cache.query(prompt, "")
    for begin, end in blocks_of(len(prompt)):
        cache.keep(writer, begin, end, {kind: fake("", [end], begin, kind) for kind in LAYOUTS[name].kinds})
    counted = Counted(monkeypatch)
    query = cache.query(prompt, "")
    offer = cache.offer(query, 0.0)
    assert offer.position == (len(prompt) - 1 if name == "kv" else len(prompt) - BLOCK)
    assert counted.packed == len(prompt)
    assert counted.looked <= blocks + 2
    assert counted.hashed <= (blocks + 2) * (BLOCK_BYTES + 32)
    before = counted.looked, counted.hashed, counted.packed
    for _ in range(100):
        assert cache.offer(query, 0.0) is offer
    assert (counted.looked, counted.hashed, counted.packed) == before


def test_tails_of_a_node_are_found_without_looking_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of short prompts under one root: a lookup tries each length once, not each prompt (E5)."""
    tree = Tree(NAMESPACE)
    for number in range(3000):
        tree.add(tree.root(""), pack([number] * (1 + number % 63))).disk[Kind.KV] = 1
    tried = 0

    class Children(dict[bytes, Node]):
        def get(self, key: bytes, default: object = None) -> object:  # type: ignore[override]
            nonlocal tried
            tried += 1
            return super().get(key, default)  # type: ignore[arg-type]

    root = tree.root("")
    root.children = Children(root.children)
    assert [len(tail.tokens) // 4 for tail in root.tails(pack([5] * 63))] == [6]
    assert tried <= 63


@pytest.mark.parametrize("blocks", [100, 10_000])
def test_an_eviction_costs_the_same_in_a_small_and_a_large_pool(blocks: int) -> None:
    """List operations are counted, not seconds (E5)."""
    cache = new_cache(LAYOUTS["kv"], 1 << 40)
    payload = Fake(b"x" * 100)
    for prompt in range(blocks // 10):
        query = cache.query([prompt] * 641, "")
        for begin in range(0, 640, BLOCK):
            cache.keep(query, begin, begin + BLOCK, {Kind.KV: payload})
    assert cache.blocks == blocks
    counts = _operations(cache, evictions=50)
    assert cache.blocks == blocks - 50
    assert counts == {"_link": 0, "_unlink": 50, "looked": 50}


def test_what_was_used_last_goes_last() -> None:
    """A hit counts as a use, for the whole path, and the deepest of it goes first (E5)."""
    cache = new_cache(LAYOUTS["kv"], 1 << 40)
    queries = [cache.query([prompt] * 200, "") for prompt in range(4)]
    for query in queries:
        for begin in range(0, 192, BLOCK):
            cache.keep(query, begin, begin + BLOCK, {Kind.KV: Fake(b"x" * 100)})
    again = cache.query([1] * 200, "")
    assert cache.take(again, cache.offer(again, 0.0).position).position == 192
    keys = [[query.match.chain.key(begin, begin + BLOCK) for begin in range(0, 192, BLOCK)] for query in queries]
    one = cache.nbytes // 12
    left = []
    for _ in range(12):
        cache.fit(cache.nbytes - one)
        left.append([sum(cache.tree.get(key) is not None for key in chain) for chain in keys])
    assert [sum(counts) for counts in left] == list(range(11, -1, -1))
    assert left[8] == [0, 3, 0, 0]
    gone = [next(i for i in range(12) if left[i][chain] == 0) for chain in range(4)]
    assert gone == [2, 11, 5, 8]
    assert cache.tree.get(keys[1][0]) is None


@pytest.mark.parametrize("chains", [10, 1000])
def test_pinned_leaves_and_their_ancestors_cost_once(chains: int) -> None:
    """Whoever cannot go is passed over once, not at each eviction, and comes back when it can (E5)."""
    cache = new_cache(LAYOUTS["kv"], 1 << 40)
    leaves = []
    for prompt in range(chains):
        query = cache.query([prompt] * 641, "")
        for begin in range(0, 640, BLOCK):
            cache.keep(query, begin, begin + BLOCK, {Kind.KV: Fake(b"x" * 100)})
        leaves.append(cache.tree.get(query.match.chain.key(576, 640)))
    for leaf in leaves[:5]:
        assert leaf is not None
        leaf.pins += 1
    assert _operations(cache, evictions=10) == {"_link": 0, "_unlink": 50 + 10, "looked": 60}
    assert all(leaf is not None and leaf.alive for leaf in leaves[:5])
    assert _operations(cache, evictions=10) == {"_link": 0, "_unlink": 10, "looked": 10}
    first = leaves[0]
    assert first is not None
    first.pins -= 1
    cache._memory.unpinned(first)
    _operations(cache, evictions=10)
    assert not first.alive, "what was used longest ago goes first again"


def _operations(cache: PrefixCache, evictions: int) -> dict[str, int]:
    memory = cache._memory
    counts = {"_link": 0, "_unlink": 0, "looked": 0}
    link, unlink, oldest = memory._link, memory._unlink, memory.oldest

    def counting_link(node: Node, before: Node) -> None:
        counts["_link"] += 1
        link(node, before)

    def counting_unlink(node: Node) -> None:
        counts["_unlink"] += node.newer is not None
        unlink(node)

    def counting_oldest(most: int) -> list[Node]:
        before = counts["_unlink"]
        found = oldest(most)
        counts["looked"] += len(found) + counts["_unlink"] - before
        return found

    memory._link, memory._unlink, memory.oldest = counting_link, counting_unlink, counting_oldest  # type: ignore[method-assign]
    before = cache.counters.evicted
    while cache.counters.evicted < before + evictions:
        cache.fit(cache.nbytes - 1)
        cache._room = 1 << 40
    del memory._link, memory._unlink, memory.oldest  # type: ignore[method-assign]
    return counts
