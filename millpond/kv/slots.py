"""Keys and values of one layer for all rows of the running batch, in the shape mlx-lm's models expect of a cache.

Each row is aligned at position 0; a rollback lowers an int in Rows. A packed layer may keep its first positions as they
were computed, in a segment of their own. A sliding layer keeps its last positions, in a ring. Engine thread only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import mlx.core as mx

from millpond.kv.format import AS_COMPUTED, Arrays, KvFormat, Sides, sides_of
from millpond.kv.leaf import LeafRow
from millpond.kv.rows import Forward
from millpond.kv.segment import KvSegment
from millpond.kv.states import StateSpec
from millpond.memory.budget import CacheSizes
from millpond.native import decode
from millpond.native.untouched import zeros
from millpond.prefix.records import Kind

RING_SLACK = 32
"""Columns of a ring beyond its window: the most tokens one forward may write, so that a rollback never lost a key."""


@dataclass(frozen=True)
class KvSpec:
    """What a layer that sees everything keeps: keys and values of each position."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    format: KvFormat = AS_COMPUTED

    kind: ClassVar[Kind] = Kind.KV
    rewinds: ClassVar[int] = sys.maxsize
    """Most tokens that a row can go back."""

    @property
    def deferred(self) -> bool:
        """Spans of what a step writes can be taken only once the step has been read."""
        return self.format.native  # C writes behind MLX's back, and no array says when

    @property
    def exact(self) -> int:
        """Positions from the start that are never packed."""
        return self.format.packing.start if self.format.packs else 0

    @property
    def token_bytes(self) -> int:
        """Bytes of a position in slots, behind those that are never packed."""
        return self.format.token_bytes(self.heads, self.key_dim, self.value_dim, self.dtype)

    @property
    def exact_bytes(self) -> int:
        """Bytes of a position as it was computed."""
        return self.heads * (self.key_dim + self.value_dim) * int(self.dtype.size)

    @property
    def sizes(self) -> CacheSizes:
        """What it takes, but for the exact positions, which all leaves have in common."""
        packed = self.exact_bytes if self.format.packs else 0
        return CacheSizes(token_bytes=self.token_bytes, exact_token_bytes=packed)

    def row_bytes(self, capacity: int) -> int:
        """Bytes of one row with room for ``capacity`` positions."""
        *exact, behind = self.columns(capacity)
        return sum(exact) * self.exact_bytes + behind * self.token_bytes

    def columns(self, capacity: int) -> list[int]:
        """Columns of each segment of a slot for ``capacity`` positions."""
        exact = min(self.exact, capacity)
        return [exact, capacity - exact] if self.exact else [capacity]

    def slot(self, leaf: LeafRow, length: int, capacity: int) -> KvSlot:
        """One row of ``length`` tokens that holds ``leaf``, with room for ``capacity`` positions; arrays of the right
        size are taken as they are."""
        if leaf.spare and leaf.arrays[0].shape[2] == capacity:
            return KvSlot(self, [KvSegment([mx.contiguous(array) for array in leaf.arrays])])
        columns = self.columns(capacity)
        segments = [KvSegment(self.zeros(count, packed=False)) for count in columns[:-1]]
        slot = KvSlot(self, [*segments, KvSegment(self.zeros(columns[-1], packed=self.format.packs), self.exact)])
        slot.put(0, leaf, length)
        return slot

    def zeros(self, columns: int, *, packed: bool) -> list[mx.array]:
        """Arrays of a segment of one row."""
        one = [mx.zeros((1, self.heads, 1, dim), dtype=self.dtype) for dim in (self.key_dim, self.value_dim)]
        like = self.format.one(*one) if packed else one
        return [zeros((1, self.heads, columns, array.shape[3]), array.dtype) for array in like]


@dataclass(frozen=True)
class RingSpec(KvSpec):
    """What a sliding layer keeps: keys and values of the last positions, none of them exempt from packing."""

    window: int = field(kw_only=True)
    """Positions that a token sees, its own included."""

    kind: ClassVar[Kind] = Kind.WINDOW
    rewinds: ClassVar[int] = RING_SLACK
    exact: ClassVar[int] = 0  # it forgets them anyway

    @property
    def capacity(self) -> int:
        """Columns of the ring."""
        return self.window + RING_SLACK

    @property
    def sizes(self) -> CacheSizes:
        return CacheSizes(
            token_bytes=0,
            row_bytes=self.capacity * self.token_bytes,
            chunk_token_bytes=self.exact_bytes,
            exact_row_bytes=self.capacity * self.exact_bytes if self.format.packs else 0,
        )

    def columns(self, capacity: int) -> list[int]:  # noqa: ARG002 - a ring does not grow
        return [self.capacity]

    def slot(self, leaf: LeafRow, length: int, capacity: int) -> RingSlot:  # noqa: ARG002 - the same
        slot = RingSlot(self, [KvSegment(self.zeros(self.capacity, packed=self.format.packs), ring=True)])
        slot.put(0, leaf, length)
        return slot


@dataclass(frozen=True)
class ChunkSpec(RingSpec):
    """What a layer keeps whose tokens see those of their chunk: positions are cut into chunks of ``window``."""

    def slot(self, leaf: LeafRow, length: int, capacity: int) -> ChunkSlot:  # noqa: ARG002 - a ring does not grow
        slot = ChunkSlot(self, [KvSegment(self.zeros(self.capacity, packed=self.format.packs), ring=True)])
        slot.put(0, leaf, length)
        return slot


LeafSpec = KvSpec | RingSpec | StateSpec
"""What a leaf keeps of each row, by its kind."""


class KvSlot:
    """A layer that sees everything: room grows with the longest row."""

    kind = Kind.KV
    window: int | None = None
    """Positions that a token sees, where not all."""

    def __init__(self, spec: KvSpec, segments: list[KvSegment]) -> None:
        """``segments``: that of the exact positions, if there are any, and that of the others. What is in a further one
        adds no room."""
        self.spec = spec
        self.segments = segments
        self.row_count = segments[0].row_count
        self.capacity = sum(segment.capacity for segment in segments[:2])
        self._forward: Forward | None = None
        self._new: tuple[mx.array, mx.array] | None = None
        self._asked_for: tuple[tuple[int, int, int, int], float, bool, int] | None = None
        """What ``_asked`` is good for."""
        self._asked = b""
        if spec.format.packs and not spec.format.native and not spec.format.unpacked:
            # How mlx-lm's attention finds out that keys and values are packed.
            self.bits, self.group_size = spec.format.packing.bits, spec.format.packing.group_size

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for segment in self.segments for array in segment.arrays]

    # --- what models ask of a cache: offset, make_mask, update_and_fetch, keys_and_values, keys and values ---

    @property
    def offset(self) -> mx.array:
        """int32 [rows]: absolute position of each row's first new token; constant during one forward."""
        return self.forward.offset

    def make_mask(
        self,
        N: int,  # noqa: N803, ARG002 - mlx-lm's name; the forward under way knows it
        return_array: bool = False,  # noqa: ARG002 - what is returned is an array whenever there is a mask
        window_size: int | None = None,
    ) -> mx.array | None:
        """Mask of the forward under way; see Forward.mask. None when a native slot sees what it would see anyway."""
        # A ring holds no more than its window, whatever else is asked for.
        window = min(filter(None, (window_size, self.window)), default=None)
        if self.spec.format.native and window == self.window:
            return None
        return self.forward.mask(window, self.capacity)

    def seen(self, forward: Forward) -> mx.array | None:
        """Its mask in a forward, where a model asks for nothing else."""
        return forward.mask(self.window, self.capacity)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array] | tuple[Arrays, Arrays]:
        """Write [rows, H, L, D] at each live row's position; what is returned is for attention alone.

        That is views of everything written so far, [n, H, width, D], or the packed arrays; a native slot keeps the new
        ones until ``attend``.
        """
        if self.forward.rows > self.forward.n:
            keys, values = keys[: self.forward.n], values[: self.forward.n]
        if self.spec.format.native:
            self._new = (keys, values)
            return keys, values
        self.write(keys, values)
        return self.keys_and_values()

    def write(self, keys: mx.array, values: mx.array) -> None:
        """The new ones of the live rows, where no C does it."""
        for segment in self.segments:
            packed = len(segment.arrays) > 2
            segment.write(self.spec.format.pack(keys, values) if packed else (keys, values), self.forward)

    def keys_and_values(self) -> tuple[mx.array, mx.array] | tuple[Arrays, Arrays]:
        """What ``update_and_fetch`` has returned in this forward, for layers that attend to those of another. Of a
        native slot nothing: what is there is its own affair."""
        if self.spec.format.native:
            empty = (self.forward.n, self.spec.heads, 0)
            return mx.zeros((*empty, self.spec.key_dim)), mx.zeros((*empty, self.spec.value_dim))
        sides = self.sides()
        if self.spec.format.unpacked and len(sides) > 1:
            return self._joined(sides)
        keys_side, values_side = sides[-1]
        packed = self.spec.format.packs and not self.spec.format.unpacked
        return (keys_side, values_side) if packed else (keys_side[0], values_side[0])

    @property
    def keys(self) -> mx.array:
        """Some models tie to these, by setting them, what nothing reads in a step; see ``arrays``."""
        return self.segments[-1].arrays[0]

    @keys.setter
    def keys(self, tied: mx.array) -> None:
        """A step evaluates everything that slots hold anyway."""

    @property
    def values(self) -> mx.array:
        """The same."""
        return sides_of(self.segments[-1].arrays)[1][0]

    @values.setter
    def values(self, tied: mx.array) -> None:
        """The same."""

    @staticmethod
    def _joined(sides: Sequence[Sides]) -> tuple[mx.array, mx.array]:
        """Keys and values of all segments that have any."""
        held = [side for side in sides if side[0][0].shape[2]]
        keys, values = ([side[0] for side in both] for both in zip(*held, strict=True))
        return mx.concatenate(keys, axis=2), mx.concatenate(values, axis=2)

    def sides(self) -> list[Sides]:
        """Keys and values of each segment as far as the forward under way may see, lazily."""
        forward = self.forward
        width, found = forward.width(self.capacity), []
        for segment in self.segments:
            arrays = segment.view(forward.n, max(0, width - segment.first))
            if len(arrays) > 2 and self.spec.format.unpacked and arrays[0].shape[2]:
                arrays = self.spec.format.unpack(arrays)
            found.append(sides_of(arrays))
        return found

    def held(self, row: int, alone: Forward) -> Arrays:
        """All that a row, ``alone`` in its forward, may see, [1, H, width, x] each, lazily; for one segment."""
        (segment,) = self.segments
        return tuple(array[row : row + 1, :, : alone.width(self.capacity)] for array in segment.arrays)

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Native slots only: write what is new and attend, all in C when MLX evaluates it. ``scale``: to the base of 2.

        Until then the arrays must stay where they are.
        """
        new, self._new = self._new or (), None
        _, heads, length, _ = queries.shape
        return decode.attend(
            self.asked(heads, length, scale, bool(new)), self.lengths(), queries, new, self.spec.value_dim
        )

    def asked(self, heads: int, length: int, scale: float, writes: bool) -> bytes:
        """What C is told of the slots in the forward under way, with so many query heads and new tokens of each row."""
        shape = (self.forward.n, heads, self.spec.heads, length)
        asked_for = (shape, scale, writes, sum([segment.moves for segment in self.segments]))
        if asked_for != self._asked_for:
            self._asked_for, self._asked = asked_for, self._job(shape, scale, writes)
        return self._asked

    def lengths(self) -> bytes:
        """What C is told of the rows."""
        return self.forward.packed_lengths

    def _job(self, shape: tuple[int, int, int, int], scale: float, writes: bool) -> bytes:
        size = self.spec.format.packing.group_size
        sides: list[decode.Stores] = []
        for side in (0, 1):
            stores = []
            for segment in self.segments:
                arrays = sides_of(segment.arrays)[side]
                bits = decode.FLOAT_BITS if len(arrays) == 1 else self.spec.format.packing.bits
                stores.append(decode.store(arrays, bits, size))
            sides.append(stores if len(stores) > 1 else [None, *stores])
        dims, exact = (self.spec.key_dim, self.spec.value_dim), self.segments[:2][-1].first
        return decode.job(shape, dims, *sides, scale=scale, exact=exact, window=self.window or 0, writes=writes)

    # --- what the arena asks ---

    @property
    def forward(self) -> Forward:
        """The one under way."""
        if self._forward is None:
            raise RuntimeError("no forward under way: call begin() first")
        return self._forward

    def begin(self, forward: Forward) -> None:
        self._forward = forward

    def keep(self, counts: Sequence[int]) -> None:  # noqa: ARG002 - what is not kept lies behind the row's end
        if self._new is not None:
            raise RuntimeError("a layer took keys without attending to them: C has not written them")
        self._forward = None

    def put(self, row: int, leaf: LeafRow, length: int) -> int:
        for segment, parts in zip(self.segments, (leaf.exact, leaf.used)[-len(self.segments) :], strict=True):
            if parts:
                segment.put(row, parts, length)
        return leaf.nbytes

    def span(self, row: int, start: int, end: int, length: int) -> Arrays:  # noqa: ARG002 - of tiles
        """Positions [start, end) of a row, all in one segment; see KvSegment.span."""
        return self.segments[-1 if start >= self.segments[-1].first else 0].span(row, start, end)

    def lift(self, row: int, length: int) -> Sequence[Arrays]:
        return [segment.lift(row, length) for segment in self.segments]

    def land(self, row: int, lifted: Sequence[Arrays]) -> None:
        for segment, arrays in zip(self.segments, lifted, strict=True):
            segment.land(row, arrays)

    def scrub(self, row: int) -> None:
        for segment in self.segments:
            segment.scrub(row)

    def fits(self, rows: int, capacity: int) -> bool:
        return rows <= self.row_count and capacity <= self.capacity

    def resize(self, rows: int, capacity: int) -> None:
        columns = self.spec.columns(capacity)
        if (rows, sum(columns[:2])) == (self.row_count, self.capacity):
            return
        if self.spec.format.native:
            mx.synchronize()  # a step in flight writes into this memory
        for segment, count in zip(self.segments, columns, strict=True):
            segment.resize(rows, count)
        self.row_count, self.capacity = rows, sum(columns[:2])

    def shrink(self, rows: int, capacity: int) -> None:
        self.resize(min(self.row_count, rows), min(self.capacity, capacity))

    def touch(self, row: int, length: int) -> None:
        if self.spec.format.native and row < self.row_count:
            for segment in self.segments:
                segment.touch(row, length)


class RingSlot(KvSlot):
    """A sliding layer: its one segment is a ring, whose size is fixed."""

    kind = Kind.WINDOW

    def __init__(self, spec: RingSpec, segments: list[KvSegment]) -> None:
        super().__init__(spec, segments)
        self.window = spec.window

    def fits(self, rows: int, capacity: int) -> bool:  # noqa: ARG002 - a ring has room for any number
        return rows <= self.row_count


class ChunkSlot(RingSlot):
    """A layer whose tokens see their chunk only, which is in the ring."""

    def make_mask(
        self,
        N: int,  # noqa: N803, ARG002 - as in others
        return_array: bool = False,  # noqa: ARG002 - the same
        window_size: int | None = None,  # noqa: ARG002 - no chunk has another size
    ) -> mx.array | None:
        return self.seen(self.forward)

    def seen(self, forward: Forward) -> mx.array | None:
        return forward.mask(self.window, self.capacity, chunked=True)
