"""What one forward needs of the live rows: offsets, write positions and masks.

All layers share one Forward. Lengths are host ints; the device arrays are built fresh for each forward and never
changed in place, so nothing small and lazy lives longer than a step. Engine thread only.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx

from millpond.native.packing import TILE


class Tiles(NamedTuple):
    """Of each row, where the positions begin that are in no whole tile."""

    ends: Sequence[int]
    """In this forward."""
    settled: Sequence[int]
    """Before it: what is between the two has to be packed."""


class Forward:
    """The geometry of one forward of ``columns`` new tokens per row over rows of the given lengths.

    Immutable. ``offset`` is int32 [rows]; ``row`` uint32 [n, 1], as MLX's own indices are: others would be cast in each
    layer.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        columns: int,
        filled_to: int = 0,
        width_step: int = 1,
        tiles: Tiles | None = None,
    ) -> None:
        """``filled_to``: the forward has so many rows, of which those behind the live ones hold and leave nothing, and
        each attends alone; 0: only live ones, which attend together. ``width_step``: where there is a mask, attention
        sees a multiple of so many columns, as far as slots have them. ``tiles``: where slots keep such."""
        self.n = len(lengths)
        self.rows = max(self.n, filled_to)
        self.apart = filled_to > 0
        self.columns = columns
        self.longest = max(lengths)
        self.aligned = min(lengths) == self.longest
        self._lengths = list(lengths)
        self._width_step = 1 if self.aligned and columns == 1 else width_step
        self._masks: dict[tuple[int | None, int, bool], mx.array | None] = {}
        self._tiled_masks: dict[tuple[int, int, int, int], mx.array] = {}
        self._columns: dict[tuple[int, int | None], mx.array] = {}
        self._tiles = tiles

    @cached_property
    def offset(self) -> mx.array:
        return mx.array(self._lengths + [0] * (self.rows - self.n), dtype=mx.int32)

    @cached_property
    def alone(self) -> list[Forward]:
        """That of each live row, as if there were no other."""
        return [Forward([length], self.columns) for length in self._lengths]

    @cached_property
    def row(self) -> mx.array:
        return mx.array([[row] for row in range(self.n)], dtype=mx.uint32)

    @cached_property
    def positions(self) -> mx.array:
        """Absolute positions written by this forward, int32 [rows, columns]."""
        return self.offset[:, None] + mx.arange(self.columns, dtype=mx.int32)[None]

    def written(self, first: int, ring: int | None = None) -> mx.array:
        """Columns that this forward writes where the first one is position ``first``, or in a ring of so many: uint32
        [n, columns]."""
        key = (first, ring)
        if key not in self._columns:
            self._columns[key] = mx.array(
                [
                    [
                        length + place - first if ring is None else (length + place) % ring
                        for place in range(self.columns)
                    ]
                    for length in self._lengths
                ],
                dtype=mx.uint32,
            )
        return self._columns[key]

    @cached_property
    def packed_lengths(self) -> bytes:
        """Tokens of each row before this forward, int64."""
        return array("q", self._lengths).tobytes()

    @property
    def tiles(self) -> Tiles:
        """Raises RuntimeError where there are none."""
        if self._tiles is None:
            raise RuntimeError("this batch keeps no tiles")
        return self._tiles

    @property
    def settling(self) -> list[tuple[int, int]]:
        """Row and first position of each tile that this forward packs."""
        pairs = enumerate(zip(self.tiles.settled, self.tiles.ends, strict=True))
        return [(row, first) for row, (settled, end) in pairs for first in range(settled, end, TILE)]

    @cached_property
    def packed_ends(self) -> bytes:
        """Where the newest positions of each row begin, then where they began before this forward, int64 each."""
        return array("q", [*self.tiles.ends, *self.tiles.settled]).tobytes()

    def within(self, first: int, end: int) -> bool:
        """Whether all positions written by this forward are in [first, end)."""
        return first <= min(self._lengths) and self.longest + self.columns <= end

    def places(self, first: int, end: int) -> tuple[mx.array, mx.array, mx.array]:
        """Of what this forward writes into [first, end): row, place among the new tokens, and column; uint32 each."""
        found = [
            (row, place, length + place - first)
            for row, length in enumerate(self._lengths)
            for place in range(self.columns)
            if first <= length + place < end
        ]
        row, place, column = (mx.array([one[i] for one in found], dtype=mx.uint32) for i in range(3))
        return row, place, column

    def width(self, capacity: int) -> int:
        """Columns of a slot that can hold anything a query of this forward may see, and perhaps some unused ones."""
        return min(self._in_steps(self.longest + self.columns), capacity)

    def _in_steps(self, count: int) -> int:
        return -(-count // self._width_step) * self._width_step

    def tiled_widths(self, exact: int, tiled: int, ring: int) -> list[int]:
        """Columns of each segment of a slot with tiles, of so many each, that a query of this forward may see."""
        behind = max(0, max(self.tiles.ends) - exact)
        written = self.longest + self.columns
        return [
            min(self._in_steps(count), most) for count, most in ((written, exact), (behind, tiled), (written, ring))
        ]

    @cached_property
    def _ends(self) -> mx.array:
        return mx.array(list(self.tiles.ends), dtype=mx.int32)[:, None, None]

    def tiled_mask(self, exact: int, tiled: int, ring: int) -> mx.array:
        """The same for a slot with tiles: the first ``exact`` positions, then whole tiles, then a ring of the newest,
        which has older ones, too."""
        # Slots grow layer by layer, and models give all layers the mask of the first.
        first, packed, newest = self.tiled_widths(exact, tiled, ring)
        key = (first, packed, newest, ring)
        if key not in self._tiled_masks:
            query, last = self.positions[: self.n, :, None], (self.offset[: self.n] + (self.columns - 1))[:, None, None]
            seen = [mx.arange(first, dtype=mx.int32) <= query]
            if packed:
                tiles = exact + mx.arange(packed, dtype=mx.int32) < self._ends
                seen.append(mx.broadcast_to(tiles, (self.n, self.columns, packed)))
            held = last - (last - mx.arange(newest, dtype=mx.int32)) % ring
            seen.append((held >= mx.maximum(self._ends, exact)) & (held <= query))
            self._tiled_masks[key] = mx.concatenate(seen, axis=-1)[:, None]
        return self._tiled_masks[key]

    def mask(self, window: int | None, capacity: int, *, chunked: bool = False) -> mx.array | None:
        """Which column each query may see: bool [rows, 1, columns, width], or None when every query sees all of them.

        Column j of a row whose newest position is ``last`` holds position last - (last - j) mod capacity: true for a
        ring, and for a plain slot (never full) too, where unused columns come out negative or beyond the query.
        ``chunked``: of the ``window`` positions only those count that are in the query's own chunk of as many.
        """
        key = (window, capacity, chunked)
        if key not in self._masks:
            self._masks[key] = self._build_mask(window, capacity, chunked=chunked)
        return self._masks[key]

    def _build_mask(self, window: int | None, capacity: int, *, chunked: bool = False) -> mx.array | None:
        everything = window is None or self.longest < window
        if self.columns == 1 and self.aligned and everything and self.longest < capacity:
            return None
        query = self.positions[:, :, None]
        last = (self.offset + (self.columns - 1))[:, None, None]
        column = mx.arange(self.width(capacity), dtype=mx.int32)[None, None]
        held = last - (last - column) % capacity
        seen = (held >= 0) & (held <= query)
        if window is not None:
            seen = seen & (held // window == query // window if chunked else held > query - window)
        return seen[:, None]
