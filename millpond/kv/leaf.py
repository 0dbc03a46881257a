"""What the arena asks of a leaf: one cache of one layer, kept for all rows of the running batch.

Most layers have one leaf, some have several; leaves are numbered through all layers. Each kind of leaf is a pair, in
slots.py: a spec, which says what a row takes, and a slot, which holds the rows. The arena and the lanes go over leaves
and know nothing else of them. What a model asks of its cache is between the slot and the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx

from millpond.kv.format import Arrays
from millpond.kv.rows import Forward
from millpond.prefix.records import Kind


class LeafRow(NamedTuple):
    """One leaf of one row, [1, heads, m + spare, x] each: the last m positions, in order."""

    arrays: Arrays
    """Behind the exact positions; none where there are no such."""
    spare: int = 0
    """Unused positions at the end of them."""
    exact: Arrays = ()
    """Keys and values of the positions that are never packed; none where there are no such."""
    newest: Arrays = ()
    """The same of those behind the last whole tile, where tiles are packed."""

    @property
    def used(self) -> Arrays:
        """The arrays without the unused positions."""
        return tuple(array[:, :, : -self.spare] for array in self.arrays) if self.spare else self.arrays

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in (*self.arrays, *self.exact, *self.newest))


class Slot(Protocol):
    """One leaf of all rows. Whatever is changed here is evaluated by the caller, for many leaves at once."""

    @property
    def kind(self) -> Kind: ...
    @property
    def row_count(self) -> int:
        """Rows that there are arrays for."""

    @property
    def nbytes(self) -> int: ...
    @property
    def arrays(self) -> Sequence[mx.array]:
        """What a step must evaluate so that no lazy graph survives it."""

    # --- a forward ---

    def begin(self, forward: Forward) -> None:
        """A forward over all rows is about to be built; there is room for it."""

    def keep(self, counts: Sequence[int]) -> None:
        """It has been built, and of row i the first ``counts[i]`` new tokens are kept."""

    # --- rows ---

    def put(self, row: int, leaf: LeafRow, length: int) -> int:
        """Fill a row with a finished prompt of ``length`` tokens, which may be 0. Bytes that are copied for that."""

    def span(self, row: int, start: int, end: int, length: int) -> Arrays:
        """What records hold of positions [start, end) of a row that has ``length``, lazily: such as forwards have
        written, not those that came with its prompt."""

    def lift(self, row: int, length: int) -> Sequence[Arrays]:
        """A copy of a row of ``length`` tokens, lazily."""

    def land(self, row: int, lifted: Sequence[Arrays]) -> None:
        """Put such a copy over another row. It must have been evaluated: what is still read cannot be written in
        place."""

    def scrub(self, row: int) -> None:
        """Zero a row that held non-finite numbers."""

    # --- room ---

    def fits(self, rows: int, capacity: int) -> bool:
        """Whether there is room for so many rows of so many positions."""

    def resize(self, rows: int, capacity: int) -> None:
        """Reallocate to the given sizes, keeping what fits."""

    def shrink(self, rows: int, capacity: int) -> None:
        """Give back what is beyond the given sizes."""

    def touch(self, row: int, length: int) -> None:
        """Have the system give the memory that a row of so many tokens is going to be put into, if there is room."""
