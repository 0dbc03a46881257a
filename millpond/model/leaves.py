"""The caches of one sequence, leaf by leaf: how mlx-lm's models fill them, and what of it rows and records take.

A leaf is one cache; most layers have one, some have several. What Millpond assumes about the insides of mlx-lm's caches
is in this file; the probe checks at start that it still holds. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, cast

import mlx.core as mx

from millpond.kv.format import Arrays, KvFormat
from millpond.kv.leaf import LeafRow
from millpond.kv.rotated import RotatedSpec
from millpond.kv.slots import ChunkSpec, KvSpec, LeafSpec, RingSpec
from millpond.kv.states import StateSlot, StateSpec
from millpond.model.upstream import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    LayerCache,
    PromptCache,
    RotatingKVCache,
)
from millpond.model.written import claim
from millpond.prefix.records import Kind


class Leaf:
    """A cache of which nothing is known: models can run with it, and that is all. What only a known one can do raises
    TypeError."""

    kind: ClassVar[Kind | None] = None
    """Which records of the prefix cache it belongs to."""
    packable: ClassVar[bool] = False
    """Formats that pack pack it."""
    window = 0
    """Sliding-window size in tokens; 0 for other leaves."""

    def __init__(self, cache: LayerCache) -> None:
        self.cache = cache

    @property
    def name(self) -> str:
        """Its kind, or what mlx-lm calls it."""
        return str(self.kind or type(self.cache).__name__)

    def spec(self, form: KvFormat) -> LeafSpec | str:  # noqa: ARG002 - for those that are packed
        """What slots of that format keep of it, read off a cache that a forward has filled; or what it is, if slots
        cannot hold that."""
        return f"a {self.name}"

    def kept_as(self, form: KvFormat) -> KvFormat:
        """The format in which slots and records of that format keep this one."""
        return form

    def exact(self, form: KvFormat) -> int:
        """Positions from the start that a format that packs leaves as they are."""
        raise TypeError(f"a {self.name} is never packed as {form}")

    def oldest(self, length: int) -> int:  # noqa: ARG002 - for windows
        """First position that a token behind ``length`` others may see."""
        return 0

    def span(self, start: int, end: int) -> Arrays:
        """What records hold of positions [start, end), as computed: lazy views. Raises ValueError when it has gone."""
        raise TypeError(f"a {self.name} cannot be cut at {start} and {end}")

    def put(self, arrays: Sequence[mx.array], length: int) -> None:
        """Fill a fresh cache of ``length`` tokens with what ``span`` gave, in order, unused positions behind them. The
        arrays are the leaf's from now on: what follows is written into them."""
        raise TypeError(f"a {self.name} cannot be filled with {len(arrays)} arrays of {length} tokens")

    def row(self) -> LeafRow:
        """All that a row adopts of a finished prompt."""
        raise TypeError(f"a {self.name} has no rows to adopt")

    def clear(self) -> None:
        """Drop what has been adopted."""


class KvLeaf(Leaf):
    """Keys and values of every position."""

    kind = Kind.KV
    packable = True
    cache: KVCache

    def spec(self, form: KvFormat) -> LeafSpec | str:
        return (RotatedSpec if form.rotated else KvSpec)(*self._sizes(), form)

    def _sizes(self) -> tuple[int, int, int, mx.Dtype]:
        held = self.cache.keys is not None
        keys, values = (self.cache.keys, self.cache.values) if held else self.span(0, 1)
        return keys.shape[1], keys.shape[3], values.shape[3], keys.dtype

    def exact(self, form: KvFormat) -> int:
        return form.packing.start

    @property
    def columns_before(self) -> int:
        """What a forward of several tokens finds in the cache, and puts its own behind."""
        return int(self.cache.offset)

    def in_order(self) -> tuple[mx.array, mx.array]:
        """Keys and values of all positions held, the newest last."""
        return self.cache.keys[:, :, : self.cache.offset], self.cache.values[:, :, : self.cache.offset]

    def span(self, start: int, end: int) -> Arrays:
        if self.cache.keys is None:  # of a layer whose attention has been taken out: no heads
            return (mx.zeros((1, 0, end - start, 0)),) * 2
        return self.cache.keys[:, :, start:end], self.cache.values[:, :, start:end]

    def put(self, arrays: Sequence[mx.array], length: int) -> None:
        (self.cache.keys, self.cache.values), self.cache.offset = arrays, length
        claim(self.cache)

    def row(self) -> LeafRow:
        if self.cache.keys is None:
            return LeafRow(())
        return LeafRow((self.cache.keys, self.cache.values), self.cache.keys.shape[2] - self.cache.offset)

    def clear(self) -> None:
        self.cache.keys = self.cache.values = None


class WindowLeaf(KvLeaf):
    """Keys and values of the last positions."""

    kind = Kind.WINDOW
    cache: RotatingKVCache

    @property
    def window(self) -> int:  # type: ignore[override]
        return int(self.cache.max_size)

    def spec(self, form: KvFormat) -> LeafSpec | str:
        return RingSpec(*self._sizes(), self.kept_as(form), window=self.window)

    def kept_as(self, form: KvFormat) -> KvFormat:
        return form.windows()

    def exact(self, form: KvFormat) -> int:  # noqa: ARG002 - it forgets the first ones anyway
        return 0

    def oldest(self, length: int) -> int:
        return max(0, length - self.window)

    @property
    def columns_before(self) -> int:
        if self.cache.keys is None:
            return 0
        return min(int(self.in_order()[0].shape[2]), self.window - 1)

    def in_order(self) -> tuple[mx.array, mx.array]:
        # Between chunks the ring may be stored rotated; only its own method knows the order.
        return self.cache._temporal_order(self.cache.keys), self.cache._temporal_order(self.cache.values)

    def span(self, start: int, end: int) -> Arrays:
        sides = self.in_order()
        first = self.cache.offset - sides[0].shape[2]
        if start < first:
            raise ValueError(f"position {start} has left the window, which begins at {first}")
        return tuple(side[:, :, start - first : end - first] for side in sides)

    def put(self, arrays: Sequence[mx.array], length: int) -> None:
        super().put(arrays, length)
        self.cache._idx = arrays[0].shape[2]

    def row(self) -> LeafRow:
        kept = min(self.cache.offset, self.window)  # after a chunk it holds more than that
        return LeafRow(tuple(side[:, :, -kept:] for side in self.in_order()))


class ChunkLeaf(WindowLeaf):
    """Keys and values of the last positions, as many as a chunk has, in a cache that does not turn."""

    cache: ChunkedKVCache

    @property
    def window(self) -> int:  # type: ignore[override]
        return int(self.cache.chunk_size)

    def spec(self, form: KvFormat) -> LeafSpec | str:
        return ChunkSpec(*self._sizes(), self.kept_as(form), window=self.window)

    @property
    def columns_before(self) -> int:
        return min(int(self.cache.offset - self.cache.start_position), self.window)

    def in_order(self) -> tuple[mx.array, mx.array]:
        held = self.cache.offset - self.cache.start_position
        return self.cache.keys[:, :, :held], self.cache.values[:, :, :held]

    def put(self, arrays: Sequence[mx.array], length: int) -> None:
        KvLeaf.put(self, arrays, length)
        self.cache.start_position = max(0, length - arrays[0].shape[2])


class RecurrentSlot(StateSlot, ArraysCache):  # type: ignore[misc]  # mlx-lm has no types
    """Some of mlx-lm's models look for the class, some take a cache apart until IndexError, some ask whether it is
    true: all of that is the class's. Its lengths and paddings are never set: a step would leave something lazy of them
    behind."""

    def __init__(self, spec: StateSpec) -> None:
        ArraysCache.__init__(self, len(spec.shapes))
        StateSlot.__init__(self, spec)


class StateLeaf(Leaf):
    """The state of a recurrent layer, which does not grow."""

    kind = Kind.STATE
    cache: ArraysCache

    def spec(self, form: KvFormat) -> LeafSpec | str:  # noqa: ARG002 - a state is never packed
        held = self.span(0, 0)
        if len(held) < len(self.cache.cache):
            return "a recurrent state of which a part stays empty"
        return StateSpec(tuple(tuple(a.shape[1:]) for a in held), tuple(a.dtype for a in held), RecurrentSlot)

    def span(self, start: int, end: int) -> Arrays:  # noqa: ARG002 - a state is of now, whatever the positions
        if self.cache.empty() or self.cache.lengths is not None or self.cache.left_padding is not None:
            raise ValueError("the recurrent layer has no state of its own yet")
        return tuple(array for array in self.cache.cache if array is not None)

    def row(self) -> LeafRow:
        return LeafRow(self.span(0, 0))

    def clear(self) -> None:
        self.cache.cache = [None] * len(self.cache.cache)

    def put(self, arrays: Sequence[mx.array], length: int) -> None:  # noqa: ARG002 - the same
        self.cache.cache = list(arrays)


class Carry(ArraysCache):  # type: ignore[misc]  # mlx-lm has no types
    """What an MTP head goes on from, as mlx-lm's caches are: a HeadCarry of single sequences."""

    def __init__(self, recorded: bool) -> None:
        """``recorded``: the prefix cache keeps it. A model without recurrent layers is restored up to any token, and
        begins with zeros there: what a head guesses is verified anyway."""
        super().__init__(size=1)
        self.recorded = recorded

    @property
    def arrays(self) -> list[mx.array]:
        """See HeadCarry."""
        return list(self.cache)

    def shift(self, hidden: mx.array) -> mx.array:
        """See HeadCarry."""
        before = mx.zeros_like(hidden[:, :1]) if self[0] is None else self[0]
        window = mx.concatenate([before, hidden], axis=1)
        self[0] = mx.contiguous(window[:, -1:])
        return window[:, :-1]


class CarrySlot(RecurrentSlot):
    """The same of all rows: a window of one token, of which a part of a step is kept as of a convolution's."""

    def shift(self, hidden: mx.array) -> mx.array:
        """See HeadCarry."""
        window = mx.concatenate([self[0], hidden], axis=1)
        if self._notes is not None:
            self._notes.convolved.append(window)
        self[0] = mx.contiguous(window[:, -1:])
        return window[:, :-1]


class CarryLeaf(StateLeaf):
    """The hidden state that an MTP head goes on from."""

    cache: Carry

    @property
    def kind(self) -> Kind | None:  # type: ignore[override]
        return Kind.STATE if self.cache.recorded else None

    @property
    def name(self) -> str:
        return str(Kind.STATE) if self.cache.recorded else CARRIED

    def spec(self, form: KvFormat) -> LeafSpec | str:
        spec = super().spec(form)
        return replace(spec, holder=CarrySlot) if isinstance(spec, StateSpec) else spec

    def row(self) -> LeafRow:
        return LeafRow(()) if self.cache.empty() else super().row()


CARRIED = "carried"
"""What a leaf is called that no record keeps and that every model can begin without."""
KINDS: dict[type, type[Leaf]] = {
    KVCache: KvLeaf,
    RotatingKVCache: WindowLeaf,
    ChunkedKVCache: ChunkLeaf,
    ArraysCache: StateLeaf,
    Carry: CarryLeaf,
}
"""By mlx-lm's class: one that derives from these may keep something else."""


def leaves_of(caches: PromptCache) -> list[Leaf]:
    """The leaves of all layers, those of layers that have several one after the other."""
    found: list[Leaf] = []
    for cache in caches:
        found += leaves_of(list(cache.caches)) if isinstance(cache, CacheList) else [_leaf(cache)]
    return found


def _leaf(cache: LayerCache) -> Leaf:
    if isinstance(cache, RotatingKVCache) and cache.keep:
        return Leaf(cache)  # it never forgets its first positions, which no slot knows
    return KINDS.get(type(cache), Leaf)(cache)


def groups_of(caches: PromptCache) -> tuple[int, ...]:
    """Of each layer, how many leaves it keeps in a list; 0: one, which is in none."""
    return tuple(len(leaves_of([cache])) if isinstance(cache, CacheList) else 0 for cache in caches)


def leaf_specs(caches: PromptCache, form: KvFormat) -> list[LeafSpec] | str:
    """What slots of that format keep of each leaf, read off caches that a forward has filled; or a sentence that says
    which layers keep what slots cannot hold."""
    specs: list[LeafSpec] = []
    misfits: dict[str, list[int]] = {}
    for layer, cache in enumerate(caches):
        found = [leaf.spec(form) for leaf in leaves_of([cache])]
        specs += [spec for spec in found if not isinstance(spec, str)]
        for what in (spec for spec in found if isinstance(spec, str)):
            misfits.setdefault(what, []).append(layer)
    told = []
    for what, (first, *more) in misfits.items():
        told.append(f"layer {first}{f' and {len(more)} more' if more else ''}: {what}, which slots cannot hold")
    return "; ".join(told) or specs


class Rounded:
    """A cache that packs and unpacks whatever it is given: what slots of that format hold, in a single sequence."""

    def __init__(self, leaf: Leaf, form: KvFormat, done: int = 0) -> None:
        """What the leaf holds behind the first ``done`` tokens is rounded at once."""
        assert isinstance(leaf, KvLeaf)
        self._leaf = leaf
        self._form = leaf.kept_as(form)
        self._exact = leaf.exact(form)
        length = leaf.cache.offset
        self._end = self._form.end(length)
        """Where rounding goes on."""
        if not length:
            return
        held = length - leaf.in_order()[0].shape[2]
        self._round(max(held, self._form.end(done), min(self._exact, length)), self._end)

    def _round(self, first: int, end: int) -> None:
        if first >= end:
            return
        length = self._leaf.cache.offset
        held = length - self._leaf.in_order()[0].shape[2]
        packed = self._form.unpack(self._form.pack(*self._leaf.span(first, end)))
        sides = zip(self._leaf.span(held, first), packed, self._leaf.span(end, length), strict=True)
        self._leaf.put([mx.concatenate(list(side), axis=2) for side in sides], length)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """As mlx-lm's, one token at a time."""
        if self._form.rotated:
            before, self._end = self._end, self._form.end(self._leaf.cache.offset)
            self._round(before, self._end)
        elif self._leaf.cache.offset >= self._exact:
            keys, values = self._form.unpack(self._form.pack(keys, values))
        return cast(tuple[mx.array, mx.array], self._leaf.cache.update_and_fetch(keys, values))

    def __getattr__(self, name: str) -> object:
        return getattr(self._leaf.cache, name)


def rounded(caches: PromptCache, form: KvFormat, done: int = 0) -> PromptCache:
    """Caches that go on as slots of that format would; the same ones where nothing is packed. See ``Rounded``."""
    if not form.packs:
        return caches

    def one(cache: LayerCache) -> LayerCache:
        if isinstance(cache, CacheList):
            return cast(LayerCache, tuple(map(one, cache.caches)))
        (leaf,) = leaves_of([cache])
        return cast(LayerCache, Rounded(leaf, form, done)) if leaf.packable else cache

    return [one(cache) for cache in caches]
