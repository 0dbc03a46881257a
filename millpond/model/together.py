"""Several prompts read in one forward, which costs a GPU little more than one of them: reading the weights rules there.

Each prompt keeps caches of its own, filled as if it had been read alone, so that whatever is done with it afterwards is
the same. In the forward, rows shorter than the longest are filled up behind their end, and nobody sees what is there.
Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx

from millpond.model.leaves import CarryLeaf, KvLeaf
from millpond.model.upstream import KVCache, Mask


class TogetherCache:
    """One layer's caches of several prompts, as mlx-lm's models use a cache, for one forward."""

    def __init__(self, leaves: Sequence[KvLeaf], counts: Sequence[int], offset: mx.array) -> None:
        """``counts``: new tokens of each prompt, at least two; one alone goes elsewhere in a ring. ``offset``: int32
        [n], where each goes on."""
        self.offset = offset
        self._leaves = leaves
        self._counts = counts
        self._before = [leaf.columns_before for leaf in leaves]
        self._window = leaves[0].window or None

    @property
    def caches(self) -> list[KVCache]:
        """Of the prompts."""
        return [leaf.cache for leaf in self._leaves]

    @property
    def counts(self) -> Sequence[int]:
        """New tokens of each."""
        return self._counts

    @cached_property
    def _width(self) -> int:
        return max(before + count for before, count in zip(self._before, self._counts, strict=True))

    def make_mask(
        self,
        N: int,  # noqa: N803 - mlx-lm's name
        return_array: bool = False,
        window_size: int | None = None,
    ) -> Mask:
        """What each of N tokens sees: "causal" where that means the same for all rows, else bool [n, 1, N, width]."""
        window, before = window_size or self._window, self._before
        if len(set(before)) == 1 and not return_array and (window is None or self._width <= window):
            return "causal"
        place = (mx.array(before, dtype=mx.int32)[:, None] + mx.arange(N, dtype=mx.int32))[:, None, :, None]
        column = mx.arange(self._width, dtype=mx.int32)
        seen = column <= place
        return seen if window is None else seen & (column > place - window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append each row's part of [n, H, N, D] to its own cache; what all of them hold then, [n, H, width, D]."""
        fetched = [
            leaf.cache.update_and_fetch(keys[row : row + 1, :, :count], values[row : row + 1, :, :count])
            for row, (leaf, count) in enumerate(zip(self._leaves, self._counts, strict=True))
        ]
        if not any(self._before):
            return keys, values  # nobody had anything: what is new is all there is
        sides = zip(*fetched, strict=True)
        all_keys, all_values = (mx.concatenate([self._filled(one) for one in side]) for side in sides)
        return all_keys, all_values

    def _filled(self, side: mx.array) -> mx.array:
        missing = self._width - int(side.shape[2])
        return mx.pad(side, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else side


class TogetherCarry:
    """What an MTP head goes on from in each prompt, for one forward: a HeadCarry."""

    def __init__(self, leaves: Sequence[CarryLeaf], counts: Sequence[int]) -> None:
        """``counts``: new tokens of each prompt."""
        self._leaves = leaves
        self._counts = counts

    @property
    def arrays(self) -> list[mx.array]:
        """See HeadCarry: who reads prompts evaluates their caches."""
        return []

    def shift(self, hidden: mx.array) -> mx.array:
        """See HeadCarry; of each row what is behind its own last token is kept."""
        nothing = mx.zeros_like(hidden[:1, :1])
        held = [nothing if leaf.cache.empty() else leaf.cache[0] for leaf in self._leaves]
        window = mx.concatenate([mx.concatenate(held), hidden], axis=1)
        for row, (leaf, count) in enumerate(zip(self._leaves, self._counts, strict=True)):
            leaf.cache[0] = mx.contiguous(window[row : row + 1, count : count + 1])
        return window[:, :-1]


def together(leaves: Sequence[KvLeaf | CarryLeaf], counts: Sequence[int], offset: mx.array) -> object:
    """One layer's caches of several prompts, for one forward; see TogetherCache."""
    carries = [leaf for leaf in leaves if isinstance(leaf, CarryLeaf)]
    if carries:
        return TogetherCarry(carries, counts)
    return TogetherCache([leaf for leaf in leaves if isinstance(leaf, KvLeaf)], counts, offset)


def caches_of(cache: object) -> tuple[Sequence[KVCache], Sequence[int]] | None:
    """Of the prompts that a layer reads on, and how many new tokens each has: () where the forward has so many of its
    only one. None of caches that hold more or less than all keys and values."""
    if type(cache) is KVCache:
        return [cache], ()
    if not isinstance(cache, TogetherCache) or any(type(one) is not KVCache for one in cache.caches):
        return None
    return cache.caches, cache.counts
