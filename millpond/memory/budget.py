"""How many bytes of keys and values a batch needs, and the bucket sizes in which the arena grows.

The arena sizes itself with the same two bucket functions, so what is planned here is what is allocated there.
Pure functions, any thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SMALLEST_CAPACITY = 256
UNLIMITED = 1 << 50
"""Tokens, more than any prompt has."""
STATE_COPIES = 2
"""Of recurrent states, those before a forward and those behind it."""
PREFILL_STEP = 256
"""Tokens by which a request's own cache grows during prefill; it never holds this many unused positions."""


def _doubled(least: int, first: int) -> int:
    return first if least <= first else 1 << (least - 1).bit_length()


def row_bucket(rows: int) -> int:
    """Rows the arena allocates to hold ``rows`` of them: 0, 1, 2, 4, 8, 16, ..."""
    return _doubled(rows, 1) if rows > 0 else 0


def rows_allocated(rows: int, row_bytes: int, limit_bytes: int) -> int:
    """Rows the arena has for ``rows`` of them, of ``row_bytes`` each: a bucket, or as many as there are once a bucket
    would take more than half of the limit, because there the room that doubling wastes is somebody's place."""
    bucket = row_bucket(rows)
    return bucket if bucket * row_bytes * 2 <= limit_bytes else rows


def capacity_bucket(tokens: int) -> int:
    """Positions per row the arena allocates for a longest row of ``tokens``: 256, 512, 1024, ..."""
    return _doubled(tokens, SMALLEST_CAPACITY)


@dataclass(frozen=True)
class CacheSizes:
    """What a model's caches take, in bytes."""

    token_bytes: int
    """Keys and values of one token of a row, in the layers whose cache grows with the context."""
    row_bytes: int = 0
    """Fixed part of a row: sliding-window rings."""
    chunk_token_bytes: int = 0
    """What a token of a prompt's chunk adds to the windows while the chunk is being read."""
    exact_token_bytes: int = 0
    """Of rows that are packed: what a token takes as computed, beside that, while its prompt is being read."""
    exact_row_bytes: int = 0
    """The same for the windows of one prompt."""
    exact_tokens: int = 0
    """Tokens of a packed row that stay as computed."""
    state_bytes: int = 0
    """Recurrent states of a row. A step makes new ones; those before it go when it has been read."""


@dataclass(frozen=True)
class MemoryBudget:
    """What a model's caches may take: ``limit_bytes`` covers arena and prefill caches."""

    sizes: CacheSizes
    limit_bytes: int
    chunk: int = 0
    """Most tokens of a prompt in one forward."""
    score_bytes: int = 0
    """Of a query over a key in all heads of a layer, where attention keeps all scores of a chunk at once; else 0."""
    scores_limit: int = 0
    """Bytes that those may take."""

    def arena_bytes(self, rows: int, longest: int) -> int:
        """Bytes of an arena that holds ``rows`` rows, the longest with ``longest`` tokens."""
        sizes, capacity = self.sizes, capacity_bucket(longest)
        exact = min(sizes.exact_tokens, capacity)
        row_bytes = (capacity - exact) * sizes.token_bytes + exact * sizes.exact_token_bytes + sizes.row_bytes
        room = rows_allocated(rows, row_bytes, self.limit_bytes) * row_bytes
        return room + rows * STATE_COPIES * sizes.state_bytes

    def prefill_bytes(self, tokens: int) -> int:
        """Upper bound for the cache of a request that has ``tokens`` computed and no row yet; 0 for none."""
        if tokens <= 0:
            return 0
        sizes = self.sizes
        fixed = sizes.row_bytes + sizes.chunk_token_bytes * self.chunk + sizes.exact_row_bytes
        fixed += STATE_COPIES * sizes.state_bytes
        return (tokens + PREFILL_STEP - 1) * (sizes.token_bytes + sizes.exact_token_bytes) + fixed

    def chunk_after(self, start: int) -> int:
        """Most tokens of a prompt in one forward behind ``start`` of them, by what attention keeps."""
        if not self.score_bytes:
            return UNLIMITED
        # The root of n * (start + n) = scores.
        return (math.isqrt(start * start + 4 * (self.scores_limit // self.score_bytes)) - start) // 2

    def alone_bytes(self, tokens: int) -> int:
        """Peak of a request of ``tokens`` with nothing beside it: recomputed whole, then adopted into a row."""
        return self.arena_bytes(1, tokens) + self.prefill_bytes(tokens - 1)

    def longest(self, most: int) -> int:
        """The longest request, up to ``most`` tokens of prompt and answer, that fits when it is alone; 0 for none."""
        fits, too_long = 0, most + 1
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.alone_bytes(middle) <= self.limit_bytes:
                fits = middle
            else:
                too_long = middle
        return fits
