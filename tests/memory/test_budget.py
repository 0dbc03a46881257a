"""Bucket sizes and byte formulas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millpond.memory.budget import UNLIMITED, CacheSizes, MemoryBudget, capacity_bucket, row_bucket


@pytest.mark.parametrize(("rows", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (16, 16), (17, 32)])
def test_row_bucket(rows: int, bucket: int) -> None:
    assert row_bucket(rows) == bucket


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 256), (256, 256), (257, 512), (1024, 1024), (1025, 2048)])
def test_capacity_bucket(tokens: int, bucket: int) -> None:
    assert capacity_bucket(tokens) == bucket


def test_bytes() -> None:
    budget = MemoryBudget(CacheSizes(10, 7), limit_bytes=8 * (512 * 10 + 7))
    assert budget.arena_bytes(0, 5000) == 0
    assert budget.arena_bytes(3, 300) == 4 * (512 * 10 + 7)
    assert budget.arena_bytes(5, 300) == 5 * (512 * 10 + 7), "room for eight would take more than half of the limit"
    assert budget.prefill_bytes(0) == 0
    assert budget.prefill_bytes(1) == 256 * 10 + 7
    assert budget.alone_bytes(1) == 256 * 10 + 7


def test_packed_bytes() -> None:
    """(I1) Rows are packed but for their first tokens; a prompt that is being read has its exact form beside it."""
    sizes = CacheSizes(
        token_bytes=10, row_bytes=7, chunk_token_bytes=3, exact_token_bytes=40, exact_row_bytes=28, exact_tokens=128
    )
    budget = MemoryBudget(sizes, limit_bytes=1 << 40, chunk=5)
    assert budget.arena_bytes(2, 300) == 2 * (128 * 40 + 384 * 10 + 7)
    assert budget.arena_bytes(1, 100) == 128 * 40 + 128 * 10 + 7
    assert budget.prefill_bytes(1) == 256 * (10 + 40) + 7 + 28 + 5 * 3


@pytest.mark.parametrize("limit", [700 << 20, 1 << 30, 2 << 30, 20 << 30])
def test_conversations_that_fit(limit: int) -> None:
    """(I1) 2k tokens each, of a model with SmolLM2's shape: 8 bits hold at least 1.8 times as many as float16."""
    counts = {}
    for name, token_bytes in {"float16": 30 * 2 * 3 * 64 * 2, "int8": 30 * 2 * 3 * (64 + 4)}.items():
        whole = 30 * 2 * 3 * 64 * 2 if name == "int8" else 0
        budget = MemoryBudget(CacheSizes(token_bytes, exact_token_bytes=whole), limit)
        count = 0
        while budget.arena_bytes(count + 1, 2048) + budget.prefill_bytes(2047) <= budget.limit_bytes:
            count += 1
        counts[name] = count
    assert counts["int8"] >= 1.8 * counts["float16"], counts


@given(st.integers(0, 200_000), st.integers(1, 1000), st.integers(0, 1 << 32))
def test_a_chunk_keeps_as_many_scores_as_it_may(start: int, score_bytes: int, limit: int) -> None:
    budget = MemoryBudget(CacheSizes(1), 1, score_bytes=score_bytes, scores_limit=limit)
    tokens = budget.chunk_after(start)
    assert tokens * (start + tokens) * score_bytes <= limit < (tokens + 1) * (start + tokens + 1) * score_bytes


def test_where_no_scores_are_kept_chunks_are_as_long_as_they_like() -> None:
    assert MemoryBudget(CacheSizes(1), 1).chunk_after(100_000) == UNLIMITED


@given(st.integers(1, 300), st.integers(1, 200_000))
def test_buckets_are_enough_and_at_most_double(rows: int, tokens: int) -> None:
    assert rows <= row_bucket(rows) < 2 * rows or rows == 1
    assert tokens <= capacity_bucket(tokens) < max(2 * tokens, 257)
    assert row_bucket(row_bucket(rows)) == row_bucket(rows)
    assert capacity_bucket(capacity_bucket(tokens)) == capacity_bucket(tokens)


def test_the_longest_request_is_the_longest_that_fits_alone() -> None:
    for limit in (0, 5_000, 12_345, 100_000, 10**9):
        budget = MemoryBudget(CacheSizes(10, 7, chunk_token_bytes=3), limit, chunk=1)
        longest = budget.longest(20_000)
        assert longest == 0 or budget.alone_bytes(longest) <= limit
        assert longest == 20_000 or budget.alone_bytes(longest + 1) > limit
