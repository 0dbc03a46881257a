"""One layer's keys and values for all rows of the running batch, in the shape mlx-lm's models expect of a cache.

Each row is aligned at position 0; a rollback lowers an int in Rows. A packed layer may keep its first positions as they
were computed, in a segment of their own. Engine thread only.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from millpond.kv.format import AS_COMPUTED, Arrays, KvFormat
from millpond.kv.rows import Rows
from millpond.kv.segment import KvSegment
from millpond.native import decode

RING_SLACK = 32
"""Columns of a ring beyond its window: the most tokens one forward may write, so that a rollback never lost a key."""
Sides = tuple[Arrays, Arrays]
"""All arrays of the keys, and all of the values."""


class LayerSpec(NamedTuple):
    """What one layer stores per position and row."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype
    window: int | None
    """Sliding-window size in tokens, or None for a plain layer."""
    format: KvFormat = AS_COMPUTED

    @property
    def capacity(self) -> int | None:
        """Columns of a sliding layer's ring; None for a plain layer, which grows."""
        return None if self.window is None else self.window + RING_SLACK

    @property
    def exact(self) -> int:
        """Positions from the start that are never packed. A ring has none: it forgets them anyway."""
        return self.format.packing.start if self.format.packs and self.window is None else 0

    @property
    def token_bytes(self) -> int:
        """Bytes of a position in slots, behind those that are never packed."""
        return self.format.token_bytes(self.heads, self.key_dim + self.value_dim, self.dtype)

    @property
    def exact_bytes(self) -> int:
        """Bytes of a position as it was computed."""
        return self.heads * (self.key_dim + self.value_dim) * int(self.dtype.size)

    def row_bytes(self, capacity: int) -> int:
        """Bytes of one row with room for ``capacity`` positions."""
        if self.capacity is not None:
            return self.capacity * self.token_bytes
        exact = min(self.exact, capacity)
        return exact * self.exact_bytes + (capacity - exact) * self.token_bytes


class LayerRow(NamedTuple):
    """One layer of one row, [1, heads, m + spare, x] each: the last m positions, in order."""

    arrays: Arrays
    """Behind the exact positions."""
    spare: int = 0
    """Unused positions at the end of them."""
    exact: Arrays = ()
    """Keys and values of the positions that are never packed; none where there are no such."""

    @property
    def used(self) -> Arrays:
        """The arrays without the unused positions."""
        return tuple(array[:, :, : -self.spare] for array in self.arrays) if self.spare else self.arrays


class Slot:
    """A plain layer, or with a window a sliding one: the same slot used as a ring."""

    def __init__(self, rows: Rows, spec: LayerSpec, segments: list[KvSegment]) -> None:
        """``segments``: that of the exact positions, if there are any, and that of the others."""
        self.rows = rows
        self.spec = spec
        self.segments = segments
        self._new: tuple[mx.array, mx.array] | None = None
        self._asked_for: tuple[tuple[int, int, int, int], float, bool] | None = None
        """What ``_asked`` is good for; None when the arrays may have moved."""
        self._asked = b""
        if spec.format.packs and not spec.format.native:
            # How mlx-lm's attention finds out that keys and values are packed.
            self.bits, self.group_size = spec.format.packing.bits, spec.format.packing.group_size

    @property
    def window(self) -> int | None:
        return self.spec.window

    @property
    def capacity(self) -> int:
        return sum(segment.capacity for segment in self.segments)

    @property
    def row_count(self) -> int:
        return self.segments[0].row_count

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for segment in self.segments for array in segment.arrays]

    # --- what models ask of a cache: offset, make_mask, update_and_fetch, keys_and_values ---

    @property
    def offset(self) -> mx.array:
        """int32 [n]: absolute position of each row's first new token; constant during one forward."""
        return self.rows.forward.offset

    def make_mask(
        self,
        N: int,  # noqa: N803, ARG002 - mlx-lm's name; the forward under way knows it
        return_array: bool = False,  # noqa: ARG002 - what is returned is an array whenever there is a mask
        window_size: int | None = None,
    ) -> mx.array | None:
        """Mask of the forward under way; see Forward.mask. None when a native slot sees what it would see anyway."""
        if self.spec.format.native and (window_size or self.window) == self.window:
            return None
        return self.rows.forward.mask(window_size or self.window, self.capacity)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array] | tuple[Arrays, Arrays]:
        """Write [n, H, L, D] at each row's position; what is returned is for attention alone.

        That is views of everything written so far, [n, H, width, D], or the packed arrays; a native slot keeps the new
        ones until ``attend``.
        """
        if self.spec.format.native:
            self._new = (keys, values)
            return keys, values
        for segment in self.segments:
            packed = len(segment.arrays) > 2
            segment.write(self.spec.format.pack(keys, values) if packed else (keys, values), self.rows.forward)
        keys_side, values_side = self.sides()[-1]
        return (keys_side, values_side) if self.spec.format.packs else (keys_side[0], values_side[0])

    def sides(self) -> list[Sides]:
        """Keys and values of each segment as far as the forward under way may see, lazily."""
        forward = self.rows.forward
        width, found = forward.width(self.capacity), []
        for segment in self.segments:
            arrays = segment.view(forward.n, max(0, width - segment.first))
            found.append((arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]))
        return found

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Native slots only: write what is new and attend, all in C when MLX evaluates it. ``scale``: to the base of 2.

        Until then the arrays must stay where they are.
        """
        new, self._new = self._new or (), None
        n, heads, length, _ = queries.shape
        shape = (n, heads, self.spec.heads, length)
        if (shape, scale, bool(new)) != self._asked_for:
            self._asked_for, self._asked = (shape, scale, bool(new)), self._job(shape, scale, bool(new))
        return decode.attend(self._asked, self.rows.forward.packed_lengths, queries, new, self.spec.value_dim)

    def _job(self, shape: tuple[int, int, int, int], scale: float, writes: bool) -> bytes:
        size = self.spec.format.packing.group_size
        sides: list[tuple[decode.Store | None, decode.Store]] = []
        for side in (0, 1):
            stores = []
            for segment in self.segments:
                half = len(segment.arrays) // 2
                bits = decode.FLOAT_BITS if half == 1 else self.spec.format.packing.bits
                stores.append(decode.store(segment.arrays[side * half :][:half], bits, size))
            sides.append((stores[0] if len(stores) > 1 else None, stores[-1]))
        dims = (self.spec.key_dim, self.spec.value_dim)
        exact, window = self.segments[-1].first, self.window or 0
        return decode.job(shape, dims, *sides, scale=scale, exact=exact, window=window, writes=writes)

    # --- what the arena asks: put, move, scrub, resize ---

    def put(self, row: int, layer: LayerRow, length: int) -> None:
        """Fill a row with a finished prompt of ``length`` tokens."""
        self._asked_for = None
        for segment, parts in zip(self.segments, (layer.exact, layer.used)[-len(self.segments) :], strict=True):
            if parts:
                segment.put(row, parts, length)

    def span(self, row: int, start: int, end: int) -> Arrays:
        """Positions [start, end) of a row, all in one segment; see KvSegment.span."""
        return self.segments[-1 if start >= self.segments[-1].first else 0].span(row, start, end)

    def lift(self, row: int, length: int) -> list[Arrays]:
        """A copy of what a row holds."""
        return [segment.lift(row, length) for segment in self.segments]

    def drop(self, row: int, lifted: list[Arrays]) -> None:
        """Write what ``lift`` returned, once evaluated, into another row."""
        self._asked_for = None
        for segment, arrays in zip(self.segments, lifted, strict=True):
            segment.drop(row, arrays)

    def scrub(self, row: int) -> None:
        """Zero a row that held non-finite numbers."""
        self._asked_for = None
        for segment in self.segments:
            segment.scrub(row)

    def resize(self, rows: int, capacity: int) -> None:
        """Reallocate to the given sizes, keeping what fits. A ring's capacity is fixed."""
        if (rows, self.capacity if self.window else capacity) == (self.row_count, self.capacity):
            return
        if self.spec.format.native:
            mx.synchronize()  # a step in flight writes into this memory
        self._asked_for = None
        for segment, columns in zip(self.segments, columns_of(self.spec, capacity), strict=True):
            segment.resize(rows, columns)


def columns_of(spec: LayerSpec, capacity: int) -> list[int]:
    """Columns of each segment of a slot for ``capacity`` positions."""
    if spec.capacity is not None:
        return [spec.capacity]
    exact = min(spec.exact, capacity)
    return [exact, capacity - exact] if spec.exact else [capacity]


def empty_slot(rows: Rows, spec: LayerSpec, row_count: int, capacity: int) -> Slot:
    """A slot of zeros."""
    columns = columns_of(spec, capacity)
    segments = []
    if len(columns) == 2:
        segments.append(KvSegment(_zeros(spec, row_count, columns[0], packed=False)))
    arrays = _zeros(spec, row_count, columns[-1], packed=spec.format.packs)
    segments.append(KvSegment(arrays, spec.exact, ring=spec.window is not None))
    return Slot(rows, spec, segments)


def _zeros(spec: LayerSpec, rows: int, columns: int, *, packed: bool) -> list[mx.array]:
    one = [mx.zeros((1, spec.heads, 1, dim), dtype=spec.dtype) for dim in (spec.key_dim, spec.value_dim)]
    like = spec.format.pack(*one) if packed else one
    return [mx.zeros((rows, spec.heads, columns, array.shape[3]), dtype=array.dtype) for array in like]
