"""Caches of prompts, mlx-lm's own, whose new keys and values C writes in place (native/layer): those of ``new_prompt``
and no others.

MLX's arrays never change, and whoever holds one counts on that. So C writes only into arrays that belong to one cache,
and only behind what is in them: those who have cut something out of them, or hold them as they were, see what they saw.
A cache that was cut short, or filled by mlx-lm, gets arrays of its own first. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import ReferenceType, ref

import mlx.core as mx

from millpond.model.upstream import KVCache, LayerCache
from millpond.native.layer import Filling
from millpond.native.untouched import zeros

MARK = "millpond_written"
"""What a cache is given."""


@dataclass
class _Mark:
    """Whose it is, how many positions are expected, and the arrays that are its own as long as it holds just so many
    positions in them. Nothing is kept alive by it: mlx-lm may replace them."""

    cache: ReferenceType[KVCache]
    room: int
    offset: int = -1
    keys: ReferenceType[mx.array] | None = None
    values: ReferenceType[mx.array] | None = None

    def owns(self, cache: KVCache) -> bool:
        if self.keys is None or self.values is None or self.offset != cache.offset:
            return False
        return self.keys() is cache.keys and self.values() is cache.values


def expect(caches: Iterable[LayerCache], tokens: int) -> None:
    """C may write into them. ``tokens`` will be read in all, if that is known: room for them is made at once, because
    growing copies them over and over."""
    for cache in caches:
        if type(cache) is KVCache:
            setattr(cache, MARK, _Mark(ref(cache), tokens))


def _mark(cache: LayerCache) -> _Mark | None:
    found: _Mark | None = getattr(cache, MARK, None)
    return found if found is not None and found.cache() is cache else None  # a copy has that of another


def expected(cache: LayerCache) -> bool:
    """Whether C may write into it."""
    return _mark(cache) is not None


def claim(cache: LayerCache) -> None:
    """The arrays that it has just been given are nobody else's."""
    mark = _mark(cache)
    if mark is not None and isinstance(cache, KVCache):
        mark.offset, mark.keys, mark.values = cache.offset, ref(cache.keys), ref(cache.values)


def taken(cache: KVCache, count: int, groups: int, dims: int, value_dims: int) -> Filling:
    """Room for so many more positions, behind all that has been written."""
    mark = _mark(cache)
    assert mark is not None
    end = cache.offset + count
    keys, values = cache.keys, cache.values
    if not mark.owns(cache) or end > keys.shape[2]:
        room = -(-max(end, mark.room) // KVCache.step) * KVCache.step
        keys = _grown(keys, cache.offset, (1, groups, room, dims))
        values = _grown(values, cache.offset, (1, groups, room, value_dims))
    mx.eval(keys, values)
    return Filling(count, cache.offset, keys, values)


def _grown(array: mx.array | None, held: int, shape: tuple[int, int, int, int]) -> mx.array:
    """An array that is nobody else's, with the first positions of ``array``."""
    grown = zeros(shape)
    if array is not None and held:
        grown[:, :, :held] = array[:, :, :held]
    return grown


def put(cache: KVCache, into: Filling, result: mx.array) -> mx.array:
    """Its positions are there once ``result``, of who writes them, is evaluated. It is returned: memory that will be
    written stays while anybody has that."""
    cache.offset = into.before + into.count
    result, cache.keys, cache.values = mx.depends([result, into.keys, into.values], [])
    claim(cache)
    return result
