"""A segment of positions of one layer, for all rows, in arrays that are written in place.

Arrays are [rows, heads, capacity, x], each row aligned at the segment's first position: keys and values, or the
arrays of a packed format. A write is one scatter at (row, :, position), a read the view [:n, :, :width]. MLX updates in
place only while nobody else holds the array, so no reference may outlive a step. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from millpond.kv.format import Arrays
from millpond.kv.rows import Forward
from millpond.native.untouched import touch, zeros

FIRST = mx.array([0], dtype=mx.int32)


class KvSegment:
    """The positions from ``first`` on, or with ``ring`` the last ``capacity`` of them; positions here are absolute."""

    def __init__(self, arrays: Sequence[mx.array], first: int = 0, ring: bool = False) -> None:
        self.first = first
        self.ring = ring
        self.moves = 0
        """Grows whenever the arrays may have got other memory: addresses taken before are void then."""
        self.arrays = arrays

    @property
    def arrays(self) -> Arrays:
        return self._arrays

    @arrays.setter
    def arrays(self, arrays: Sequence[mx.array]) -> None:
        self.moves += 1
        self._arrays = tuple(arrays)
        self.nbytes = sum(int(array.nbytes) for array in arrays)  # asked for in each step

    def _set(self, where: tuple[slice | mx.array, ...], parts: Sequence[mx.array]) -> None:
        """Write into all arrays: the only way that it is done. MLX copies those that somebody else holds."""
        self.moves += 1
        for array, part in zip(self._arrays, parts, strict=True):
            if array.size:  # some leaves have keys only; MLX divides by the size of what is written
                array[where] = part

    @property
    def capacity(self) -> int:
        return int(self.arrays[0].shape[2])

    @property
    def row_count(self) -> int:
        return int(self.arrays[0].shape[0])

    def _held(self, length: int) -> int:
        """Columns in use by a row of ``length`` positions."""
        return max(0, min(length - self.first, self.capacity))

    def write(self, parts: Arrays, forward: Forward) -> None:
        """Write [n, H, L, x] at each row's position; what is not of this segment is left out."""
        start, end = forward.longest, forward.longest + forward.columns
        if forward.aligned and self.first <= start and (end - self.first <= self.capacity):
            self._set(np.s_[: forward.n, :, start - self.first : end - self.first], parts)
        elif self.ring or forward.within(self.first, self.first + self.capacity):
            column = forward.written(self.first, self.capacity if self.ring else None)
            self._set((forward.row, slice(None), column), [part.swapaxes(1, 2) for part in parts])
        else:
            row, place, column = forward.places(self.first, self.first + self.capacity)
            if row.size:
                self._set((row, slice(None), column), [part[row, :, place] for part in parts])

    def view(self, n: int, width: int) -> Arrays:
        """Everything that the first ``n`` rows hold up to column ``width``, lazily."""
        return tuple(array[:n, :, :width] for array in self._arrays)

    def put(self, row: int, parts: Arrays, length: int) -> None:
        """Fill a row of ``length`` positions with [1, H, m, x]: the last m of them that belong here, in order."""
        last = min(length, self.first + self.capacity) if not self.ring else length
        count = int(parts[0].shape[2])
        kept = min(count, self._held(length))
        done = 0
        while done < kept:  # once for a plain segment; a ring may wrap once
            column = (last - kept + done - self.first) % self.capacity
            many = min(kept - done, self.capacity - column)
            skip = count - kept + done
            pieces = [part[:, :, skip : skip + many] for part in parts]
            if self.row_count == 1 and many == self.capacity:
                # Assigning a whole array makes it a view of what is assigned; ours must have memory of their own.
                pieces = [mx.take(piece, FIRST, axis=0) for piece in pieces]
            self._set(np.s_[row : row + 1, :, column : column + many], pieces)
            done += many

    def fill(self, row: int, start: int, parts: Arrays) -> None:
        """Write [1, H, m, x] over the positions from ``start`` on of a row, in a segment that is no ring."""
        column = start - self.first
        self._set(np.s_[row : row + 1, :, column : column + int(parts[0].shape[2])], parts)

    def span(self, row: int, start: int, end: int) -> Arrays:
        """Positions [start, end) of a row, all of which must be here, as lazy views or copies [1, H, n, x].

        To be evaluated together with the step that wrote them, like the views that attention reads.
        """
        if not self.ring:
            return tuple(array[row : row + 1, :, start - self.first : end - self.first] for array in self.arrays)
        column = mx.arange(start, end, dtype=mx.int32) % self.capacity
        return tuple(mx.take(array[row : row + 1], column, axis=2) for array in self.arrays)

    def lift(self, row: int, length: int) -> Arrays:
        """A lazy copy of what a row of ``length`` positions holds, in its columns; nothing where that is nothing."""
        held = self._held(length)
        return tuple(_lifted(array, row, held) for array in self.arrays) if held else ()

    def land(self, row: int, lifted: Arrays) -> None:
        """Write such a copy, which has been evaluated, into another row."""
        if lifted:
            self._set(np.s_[row : row + 1, :, : int(lifted[0].shape[2])], lifted)

    def scrub(self, row: int) -> None:
        """Zero a row that held non-finite numbers: a masked NaN still poisons 0 x V of the row's next owner."""
        self._set(np.s_[row : row + 1, :], [mx.zeros_like(array[row : row + 1]) for array in self.arrays])

    def touch(self, row: int, length: int) -> None:
        """Have the system give the memory of what a row of so many positions holds here."""
        for array in self.arrays:
            _, heads, capacity, numbers = array.shape
            for head in range(heads):
                place = (row * heads + head) * capacity * numbers * array.itemsize
                touch(array, place, self._held(length) * numbers * array.itemsize)

    def resize(self, rows: int, capacity: int) -> None:
        """Reallocate to the given sizes, keeping what fits, lazily."""
        if (rows, capacity) != (self.row_count, self.capacity):
            self.arrays = [_resized(array, rows, capacity) for array in self.arrays]


def _lifted(array: mx.array, row: int, held: int) -> mx.array:
    """The first ``held`` columns of a row, in memory of their own, lazily."""
    # MLX's CPU copies what has gaps element by element: the larger they are, the faster. Gathering it is slower yet.
    wide = mx.uint64 if array.shape[3] * array.itemsize % mx.uint64.size == 0 else array.dtype
    # A slice itself would share the memory, and block writes in place.
    return mx.contiguous(array.view(wide)[row : row + 1, :, :held]).view(array.dtype)


def _resized(array: mx.array, rows: int, capacity: int) -> mx.array:
    kept_rows, kept = min(rows, array.shape[0]), min(capacity, array.shape[2])
    resized = zeros((rows, array.shape[1], capacity, array.shape[3]), array.dtype)
    resized[:kept_rows, :, :kept] = array[:kept_rows, :, :kept]
    # When nothing but the old numbers is left it is a view of the old memory, which would then stay.
    return mx.contiguous(resized)
