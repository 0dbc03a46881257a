"""Keys and values of a layer that sees everything, packed a tile of positions at a time, rotated.

The first positions stay as computed, and so do the newest, in a ring, until they make a whole tile: then that is
packed, once, by the next forward that writes. Which those are follows from a row's length alone, so a rollback costs
nothing. Engine thread only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from millpond.kv.format import Arrays, Sides, sides_of
from millpond.kv.leaf import LeafRow
from millpond.kv.rows import Forward
from millpond.kv.segment import KvSegment
from millpond.kv.slots import RING_SLACK, KvSlot, KvSpec
from millpond.memory.budget import CacheSizes
from millpond.native.packing import TILE

RING = 2 * TILE + RING_SLACK
"""Columns for the newest positions: a tile that is about to be packed, one that is being filled, and a rollback."""


@dataclass(frozen=True)
class RotatedSpec(KvSpec):
    """What such a layer keeps."""

    rewinds: ClassVar[int] = RING_SLACK

    @property
    def sizes(self) -> CacheSizes:
        return CacheSizes(
            token_bytes=self.token_bytes, exact_token_bytes=self.exact_bytes, row_bytes=RING * self.exact_bytes
        )

    def row_bytes(self, capacity: int) -> int:
        exact, behind, newest = self.columns(capacity)
        return (exact + newest) * self.exact_bytes + behind * self.token_bytes

    def columns(self, capacity: int) -> list[int]:
        exact = min(self.exact, capacity)
        return [exact, capacity - exact, RING]

    def slot(self, leaf: LeafRow, length: int, capacity: int) -> RotatedSlot:
        exact, behind, newest = self.columns(capacity)
        segments = [
            KvSegment(self.zeros(exact, packed=False)),
            KvSegment(self.zeros(behind, packed=True), self.exact),
            KvSegment(self.zeros(newest, packed=False), ring=True),
        ]
        slot = RotatedSlot(self, segments)
        slot.put(0, leaf, length)
        return slot


class RotatedSlot(KvSlot):
    """Its rows. Segments: the first positions, those in tiles, and a ring of the newest."""

    def seen(self, forward: Forward) -> mx.array:
        exact, tiled, newest = self.segments
        return forward.tiled_mask(exact.capacity, tiled.capacity, newest.capacity)

    def make_mask(
        self,
        N: int,  # noqa: N803, ARG002 - as in others
        return_array: bool = False,  # noqa: ARG002 - the same
        window_size: int | None = None,
    ) -> mx.array | None:
        if window_size is not None:
            raise ValueError("a column of a slot with tiles is no position: windows have slots of their own")
        return None if self.spec.format.native else self.seen(self.forward)

    def write(self, keys: mx.array, values: mx.array) -> None:
        exact, _, newest = self.segments
        exact.write((keys, values), self.forward)
        newest.write((keys, values), self.forward)
        for row, first in self.forward.settling:
            self._settle(row, first)

    def _settle(self, row: int, first: int) -> None:
        """Pack a tile whose positions are in the ring."""
        self.segments[1].fill(row, first, self.spec.format.pack(*self.segments[2].span(row, first, first + TILE)))

    def sides(self) -> list[Sides]:
        exact, tiled, newest = self.segments
        widths = self.forward.tiled_widths(exact.capacity, tiled.capacity, newest.capacity)
        views = [segment.view(self.forward.n, width) for segment, width in zip(self.segments, widths, strict=True)]
        if self.spec.format.unpacked and widths[1]:
            views[1] = self.spec.format.unpack(views[1])
        return [sides_of(view) for view in views]

    def lengths(self) -> bytes:
        forward = self.forward
        return forward.packed_lengths + forward.packed_ends

    def put(self, row: int, leaf: LeafRow, length: int) -> int:
        parts = (leaf.exact, leaf.arrays, leaf.newest)
        for segment, arrays, held in zip(
            self.segments, parts, (length, self.spec.format.end(length), length), strict=True
        ):
            if arrays:
                segment.put(row, arrays, held)
        return leaf.nbytes

    def span(self, row: int, start: int, end: int, length: int) -> Arrays:
        exact, tiled, newest = self.segments
        if end <= tiled.first:
            return exact.span(row, start, end)
        if end % TILE:
            return newest.span(row, start, end)
        # What was packed lately may have been so by a forward that is still in flight.
        if end + TILE > length:
            return self.spec.format.pack(*newest.span(row, start, end))
        return tiled.span(row, start, end)
