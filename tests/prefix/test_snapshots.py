"""Snapshots of recurrent layers are large: where memory is short they go before blocks do, oldest first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_support import LAYOUTS, blocks_of, check_memory, check_tree, fake, new_cache

from millpond.prefix.cache import PrefixCache
from millpond.prefix.records import BLOCK, Kind

SIZES = {Kind.KV: 4096, Kind.STATE: 16384}
NODE = 1024
BOTH = NODE + SIZES[Kind.KV] + SIZES[Kind.STATE]
"""Bytes of a block with a snapshot."""


def tokens(conversation: int, blocks: int) -> list[int]:
    return [conversation * 1000 + place for place in range(blocks * BLOCK)]


def resumable(cache: PrefixCache, prompt: list[int]) -> int:
    return cache.plan(cache.query([*prompt, 1], ""), disk=False).position


def kept(cache: PrefixCache, prompt: list[int], *states: int) -> None:
    """All blocks of a prompt, with snapshots at these positions and at its end."""
    query = cache.query([*prompt, 1], "")
    query.match.chain.extend(prompt)
    for begin, end in blocks_of(len(prompt)):
        kinds = [Kind.KV, Kind.STATE] if end in (*states, len(prompt)) else [Kind.KV]
        kinds = cache.missing(query, begin, end, kinds)
        cache.keep(query, begin, end, {kind: fake("", prompt[:end], begin, kind, SIZES[kind]) for kind in kinds})
    cache.end_at(query, len(prompt), last=True)


def test_they_are_counted_apart() -> None:
    cache = new_cache(LAYOUTS["state"])
    kept(cache, tokens(1, 4), BLOCK, 3 * BLOCK)
    assert (cache.snapshots, cache.snapshot_bytes, cache.blocks) == (3, 3 * SIZES[Kind.STATE], 4)
    assert cache.nbytes == 3 * BOTH + NODE + SIZES[Kind.KV]


def test_those_that_nobody_came_back_to_go_first() -> None:
    """Early snapshots of a long prompt go; its end, and every block, stay."""
    cache = new_cache(LAYOUTS["state"], limit_bytes=8 * BOTH)
    long = tokens(1, 8)
    kept(cache, long, *range(BLOCK, 8 * BLOCK, BLOCK))
    assert cache.snapshots == 8
    kept(cache, tokens(2, 2))
    assert cache.counters.snapshots_dropped == 2
    assert cache.counters.evicted == 0
    assert resumable(cache, long) == 8 * BLOCK
    assert resumable(cache, tokens(2, 2)) == 2 * BLOCK
    assert resumable(cache, long[: 3 * BLOCK]) == 3 * BLOCK
    assert resumable(cache, long[: 2 * BLOCK]) == 0, "its blocks are there, and nothing to resume at"


def test_what_was_used_again_stays() -> None:
    cache = new_cache(LAYOUTS["state"], limit_bytes=8 * BOTH)
    long = tokens(1, 8)
    kept(cache, long, *range(BLOCK, 8 * BLOCK, BLOCK))
    query = cache.query([*long[:BLOCK], 1], "")
    assert cache.take(query, cache.plan(query, disk=False).position).position == BLOCK
    kept(cache, tokens(2, 2))
    assert resumable(cache, long[:BLOCK]) == BLOCK
    assert resumable(cache, long[: 3 * BLOCK]) == BLOCK


def test_while_there_is_room_they_may_have_all_of_it() -> None:
    cache = new_cache(LAYOUTS["state"], limit_bytes=10 * BOTH)
    for conversation in range(10):
        kept(cache, tokens(conversation, 1))
    assert cache.snapshots == 10
    assert (cache.counters.snapshots_dropped, cache.counters.evicted) == (0, 0)
    kept(cache, tokens(10, 1))
    assert (cache.counters.snapshots_dropped, cache.counters.evicted) == (2, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=12), st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_the_figures_are_those_of_the_records(stored: list[tuple[int, int]], limit: int) -> None:
    cache = new_cache(LAYOUTS["state"], limit_bytes=limit * BOTH)
    for conversation, blocks in stored:
        kept(cache, tokens(conversation, blocks), *range(BLOCK, blocks * BLOCK, BLOCK))
        held = [node.records[Kind.STATE] for node in cache.tree.nodes() if Kind.STATE in node.records]
        assert (cache.snapshots, cache.snapshot_bytes) == (len(held), sum(payload.nbytes for payload in held))
        assert cache.nbytes <= limit * BOTH
        check_memory(cache)
        check_tree(cache.tree)
