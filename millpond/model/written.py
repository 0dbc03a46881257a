"""Caches of prompts, mlx-lm's own, whose new keys and values C writes in place (native/layer).

MLX's arrays never change, and whoever holds one counts on that. So C writes only into arrays that belong to one cache,
and only behind what is in them: those who have cut something out of them, or hold them as they were, see what they saw.
A cache that was copied, cut short or filled by mlx-lm gets arrays of its own first. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from millpond.model.upstream import KVCache, LayerCache
from millpond.native.layer import Filling
from millpond.native.untouched import zeros

OURS, ROOM = "millpond_written", "millpond_room"
"""What a cache is given: to know its arrays by, and how many positions will come."""


@dataclass(frozen=True)
class _Written:
    """Whose arrays, and as what MLX knows them: the same memory, behind whoever writes it."""

    cache: int
    offset: int
    keys: mx.array
    values: mx.array
    known_keys: mx.array
    known_values: mx.array

    def has(self, cache: KVCache, end: int) -> bool:
        """Whether nobody has done anything to it since, and there is room up to ``end``."""
        same = cache.keys is self.known_keys and cache.values is self.known_values
        return same and self.cache == id(cache) and self.offset == cache.offset and end <= self.keys.shape[2]


def expect(caches: Iterable[LayerCache], tokens: int) -> None:
    """So many positions will be read into them. Room for all is made at once: growing would copy them over and over."""
    for cache in caches:
        if type(cache) is KVCache:
            setattr(cache, ROOM, tokens)


def claim(cache: KVCache) -> None:
    """The arrays that it has been given are nobody else's."""
    setattr(cache, OURS, _Written(id(cache), cache.offset, *(cache.keys, cache.values) * 2))


def taken(cache: KVCache, count: int, groups: int, dims: int, value_dims: int) -> Filling:
    """Room for so many more positions."""
    mark: _Written | None = getattr(cache, OURS, None)
    end = cache.offset + count
    if mark is not None and mark.has(cache, end):
        keys, values = mark.keys, mark.values
    else:
        room = -(-max(end, getattr(cache, ROOM, 0)) // KVCache.step) * KVCache.step
        keys = _grown(cache.keys, cache.offset, (1, groups, room, dims))
        values = _grown(cache.values, cache.offset, (1, groups, room, value_dims))
    mx.eval(keys, values)
    return Filling(count, cache.offset, keys, values)


def _grown(array: mx.array | None, held: int, shape: tuple[int, int, int, int]) -> mx.array:
    """An array that is nobody else's, with the first positions of ``array``."""
    grown = zeros(shape)
    if array is not None and held:
        grown[:, :, :held] = array[:, :, :held]
    return grown


def behind(x: mx.array, caches: Sequence[KVCache]) -> mx.array:
    """The same, which is computed after what the caches are waiting for."""
    held = [array for one in caches if one.offset for array in (one.keys, one.values)]
    return mx.depends([x], held)[0] if held else x


def put(cache: KVCache, into: Filling, result: mx.array) -> mx.array:
    """Its positions are there once ``result``, of who writes them, is evaluated. It is returned: memory that
    will be written stays while anybody has that."""
    cache.offset = into.before + into.count
    result, cache.keys, cache.values = mx.depends([result, into.keys, into.values], [])
    mark = _Written(id(cache), cache.offset, into.keys, into.values, cache.keys, cache.values)
    setattr(cache, OURS, mark)
    return result


def forget(cache: KVCache) -> None:
    """Let go of its arrays."""
    cache.keys = cache.values = None
    if hasattr(cache, OURS):
        delattr(cache, OURS)
