"""One layer's keys and values for all rows of the running batch, in the shape mlx-lm's models expect of a cache.

Arrays are [rows, kv_heads, capacity, head_dim], each row aligned at position 0. A write is one scatter at
(row, :, position), a read is the view [:n, :, :width], a rollback lowers an int in Rows. MLX updates in place only
while nobody else holds the array, so no reference to ``keys`` or ``values`` may outlive a step (donation.py checks).
Engine thread only.
"""

from __future__ import annotations

import mlx.core as mx

from kvarn.kv.rows import Rows


class Slot:
    """A plain layer, or with ``window`` a sliding one: the same slot used as a ring of ``capacity`` columns."""

    def __init__(self, rows: Rows, keys: mx.array, values: mx.array, window: int | None = None) -> None:
        self.rows = rows
        self.keys = keys
        self.values = values
        self.window = window

    @property
    def capacity(self) -> int:
        return int(self.keys.shape[2])

    @property
    def row_count(self) -> int:
        return int(self.keys.shape[0])

    @property
    def nbytes(self) -> int:
        return int(self.keys.nbytes + self.values.nbytes)

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
        """Mask of the forward under way; see Forward.mask."""
        return self.rows.forward.mask(window_size or self.window, self.capacity)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [n, H, L, D] at each row's position and return views of everything written so far, [n, H, width, D]."""
        forward = self.rows.forward
        start = forward.longest
        if forward.aligned and start + forward.columns <= self.capacity:
            end = start + forward.columns
            self.keys[: forward.n, :, start:end] = keys
            self.values[: forward.n, :, start:end] = values
        else:
            column = forward.positions % self.capacity if self.window else forward.positions
            self.keys[forward.row, :, column] = keys.swapaxes(1, 2)
            self.values[forward.row, :, column] = values.swapaxes(1, 2)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        forward = self.rows.forward
        n, width = forward.n, forward.width(self.capacity)
        return self.keys[:n, :, :width], self.values[:n, :, :width]

    # --- what the arena asks: put, move, scrub, resize ---

    def put(self, row: int, keys: mx.array, values: mx.array, length: int) -> None:
        """Fill a row with a finished prompt: [1, H, m, D] holding its last m positions, in order, of ``length``."""
        kept = min(int(keys.shape[2]), self.capacity)
        first = length - kept
        written = 0
        while written < kept:  # once for a plain slot; a ring may wrap once
            column = (first + written) % self.capacity
            count = min(kept - written, self.capacity - column)
            skip = int(keys.shape[2]) - kept + written
            self.keys[row : row + 1, :, column : column + count] = keys[:, :, skip : skip + count]
            self.values[row : row + 1, :, column : column + count] = values[:, :, skip : skip + count]
            written += count

    def span(self, row: int, start: int, end: int) -> tuple[mx.array, mx.array]:
        """Positions [start, end) of a row, which a ring must still hold, as lazy views or copies [1, H, n, D].

        To be evaluated together with the step that wrote them, like the views that attention reads.
        """
        if self.window is None:
            return self.keys[row : row + 1, :, start:end], self.values[row : row + 1, :, start:end]
        column = mx.arange(start, end, dtype=mx.int32) % self.capacity
        return mx.take(self.keys[row : row + 1], column, axis=2), mx.take(self.values[row : row + 1], column, axis=2)

    def lift(self, row: int, length: int) -> tuple[mx.array, mx.array]:
        """A copy of a row's used columns. A gather, because a slice may share the buffer and block in-place writes."""
        index = mx.array([row], dtype=mx.int32)
        used = min(length, self.capacity)
        return mx.take(self.keys, index, axis=0)[:, :, :used], mx.take(self.values, index, axis=0)[:, :, :used]

    def drop(self, row: int, lifted: tuple[mx.array, mx.array]) -> None:
        """Write what ``lift`` returned, once evaluated, into another row: same columns, no wrap."""
        used = lifted[0].shape[2]
        self.keys[row : row + 1, :, :used] = lifted[0]
        self.values[row : row + 1, :, :used] = lifted[1]

    def scrub(self, row: int) -> None:
        """Zero a row that held non-finite numbers: a masked NaN still poisons 0 x V of the row's next owner."""
        self.keys[row : row + 1] = mx.zeros_like(self.keys[row : row + 1])
        self.values[row : row + 1] = mx.zeros_like(self.values[row : row + 1])

    def resize(self, rows: int, capacity: int) -> None:
        """Reallocate to the given sizes, keeping what fits. A ring's capacity is fixed."""
        capacity = self.capacity if self.window else capacity
        if (rows, capacity) != (self.keys.shape[0], self.capacity):
            self.keys, self.values = (_resized(array, rows, capacity) for array in (self.keys, self.values))
            mx.eval(self.keys, self.values)


def _resized(array: mx.array, rows: int, capacity: int) -> mx.array:
    kept_rows, kept = min(rows, array.shape[0]), min(capacity, array.shape[2])
    resized = mx.zeros((rows, array.shape[1], capacity, array.shape[3]), dtype=array.dtype)
    resized[:kept_rows, :, :kept] = array[:kept_rows, :, :kept]
    return resized
