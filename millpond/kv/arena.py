"""All layers' slots together: rows join (put), leave (release), and the arrays grow.

Resizes and moves are evaluated at once, a few layers at a time: that bounds what is there twice meanwhile, and leaves
no lazy reader behind that would keep the next write from happening in place. Engine thread only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import mlx.core as mx

from millpond.kv.batch import Batch
from millpond.kv.format import Arrays
from millpond.kv.leaf import LeafRow, Slot
from millpond.kv.rotated import RotatedSpec
from millpond.kv.rows import Forward, Tiles
from millpond.kv.slots import LeafSpec
from millpond.memory.budget import capacity_bucket, rows_allocated
from millpond.prefix.records import Kind

NO_LIMIT = 1 << 62
AT_ONCE_BYTES = 64 * 1024 * 1024
"""Of copies, what is waited for together: for a GPU a wait is as dear as many small copies."""
TOUCHED_AT_ONCE = 4
"""Of the layers, one in so many: the memory of a long row takes the system some time to give."""


class Copies:
    """Arrays that are being filled, evaluated whenever they are many bytes."""

    def __init__(self, many: int = 0) -> None:
        """``many`` bytes; 0: as many as usual."""
        self._many = many or AT_ONCE_BYTES
        self._arrays: list[mx.array] = []
        self._bytes = 0

    def add(self, arrays: Sequence[mx.array], copied: int) -> None:
        """``arrays`` are to be evaluated, which copies so many bytes."""
        self._arrays += arrays
        self._bytes += copied
        if self._bytes >= self._many:
            self.wait()

    def wait(self) -> None:
        """For all that have been added."""
        mx.eval(self._arrays)
        self._arrays, self._bytes = [], 0


class Arena:
    """The running batch's keys and values."""

    def __init__(
        self,
        specs: Sequence[LeafSpec],
        limit_bytes: int = NO_LIMIT,
        width_step: int = 1,
        groups: Sequence[int] = (),
    ) -> None:
        """``width_step``: see Forward. ``groups``: of each layer, how many leaves it keeps in a list; 0: one, which is
        in none. Nothing at all: that is so of all."""
        self._limit_bytes = limit_bytes
        self._groups = groups
        self._width_step = width_step
        tiled = [spec for spec in specs if isinstance(spec, RotatedSpec)]
        self._tiled = bool(tiled)
        self.batch = Batch(tiled[0].format.end) if tiled else Batch()
        self.slots: list[Slot] = []
        self._specs = specs
        self._nothing = [LeafRow(())] * len(specs)
        """A row of no tokens."""
        self._reserved = (0, 0)
        """Rows and tokens that the next adoption will need."""
        self._touched = (0, 0, 0)
        """A row, its tokens, and in how many slots it has been given memory."""
        self._forward: Forward | None = None
        """The one under way."""
        self._several = False
        """Whether a forward of several columns has left what is yet to be computed."""

    @property
    def lengths(self) -> Sequence[int]:
        return self.batch.lengths

    @property
    def deferred(self) -> bool:
        return any(spec.deferred for spec in self._specs)

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    def put(self, name: str, leaves: Iterable[LeafRow], length: int) -> int:
        """Copy a request's finished prompt into the next row and return that row's number.

        ``leaves`` has one entry per leaf, or none at all when ``length`` is 0. It is consumed one by one, so a
        generator may drop each source as it goes. If it raises, the live rows are as they were.
        """
        row = len(self.lengths)
        self.unreserve()
        if not self.lengths and all(slot.row_count <= 1 for slot in self.slots):
            self.slots.clear()
            self.slots = self._first_row(leaves, length)
            return self.batch.join(name, length)
        self._make_room(self.slots, row + 1, max([length + 1, *self.lengths]))
        copies = Copies()
        for slot, leaf in zip(self.slots, leaves if length else self._nothing, strict=True):
            copied = slot.put(row, leaf, length)
            copies.add(slot.arrays, copied)
        copies.wait()
        return self.batch.join(name, length)

    def _first_row(self, leaves: Iterable[LeafRow], length: int) -> list[Slot]:
        """Slots with one row that holds ``leaves``."""
        capacity = capacity_bucket(length + 1)
        slots: list[Slot] = []
        copies = Copies()
        for spec, leaf in zip(self._specs, leaves if length else self._nothing, strict=True):
            slots.append(spec.slot(leaf, length, capacity))
            copies.add(slots[-1].arrays, slots[-1].nbytes)
        copies.wait()
        return slots

    def _handed_out(self) -> Sequence[object]:
        """The slots, layer by layer, as models expect their caches."""
        if not any(self._groups):
            return self.slots
        rest = iter(self.slots)
        return [tuple(islice(rest, count)) if count else next(rest) for count in self._groups]

    def release(self, name: str, scrub: bool = False) -> None:
        """Free a request's row. ``scrub`` zeroes what it held (non-finite numbers).

        Of several rows those to be scrubbed go first: where a row has been moved away from, its numbers stay.
        """
        row, last = self.batch.leave(name)
        if scrub:
            self._scrub(row)
        if row != last:
            self._move(last, row)
            if scrub:  # perhaps that one is to be scrubbed next
                self._scrub(last)

    def _scrub(self, row: int) -> None:
        copies = Copies()
        for slot in self.slots:
            slot.scrub(row)
            copies.add(slot.arrays, slot.nbytes // max(1, slot.row_count))
        copies.wait()

    def _move(self, source: int, target: int) -> None:
        """Copy what row ``source`` holds over row ``target``, which has its length."""
        length = self.lengths[target]
        row_bytes = sum(slot.nbytes for slot in self.slots) // sum(slot.row_count for slot in self.slots)
        many = max(1, AT_ONCE_BYTES // max(1, row_bytes))
        for first in range(0, len(self.slots), many):
            some = self.slots[first : first + many]
            lifted = [slot.lift(source, length) for slot in some]
            mx.eval(lifted)
            for slot, arrays in zip(some, lifted, strict=True):
                slot.land(target, arrays)
            mx.eval([slot.arrays for slot in some])

    def spans(self, name: str, start: int, end: int, kind: Kind) -> list[Arrays]:
        """Positions [start, end) of a row, lazily, one entry per leaf; an empty one for leaves of other kinds."""
        row = self.batch.row(name)
        length = self.lengths[row]
        return [slot.span(row, start, end, length) if slot.kind is kind else () for slot in self.slots]

    def begin(self, columns: int, filled_to: int = 0) -> Sequence[object]:
        """Make room for ``columns`` new tokens in every row and hand out the slots as the forward's cache, a tuple of
        them where a layer has several. ``filled_to``: see Forward."""
        self.settle()
        self._make_room(self.slots, len(self.lengths), max(self.lengths) + columns)
        tiles = Tiles(self.batch.ends, self.batch.settled) if self._tiled else None
        self._forward = Forward(self.lengths, columns, filled_to, self._width_step, tiles)
        for slot in self.slots:
            slot.begin(self._forward)
        return self._handed_out()

    def advance(self, counts: Sequence[int]) -> None:
        """Keep ``counts[i]`` of the tokens that the forward wrote into row i."""
        for slot in self.slots:
            slot.keep(counts)
        self.batch.advance(counts)
        self._several = self._several or (self._forward is not None and self._forward.columns > 1)
        self._forward = None

    def settle(self) -> None:
        """Compute what a forward of several columns has left of states, a few layers at a time: those from before go as
        those behind it come. Until then there are only the former."""
        if self._several:
            self._several = False
            states = [slot for slot in self.slots if slot.kind is Kind.STATE]
            copies = Copies(max(AT_ONCE_BYTES // 2, sum(slot.nbytes for slot in states) // 4))
            for slot in states:
                copies.add(slot.arrays, slot.nbytes)  # what remains is computed with the next forward

    def room(self, columns: int) -> None:
        """Make room for so many tokens behind the end of every row."""
        self._make_room(self.slots, len(self.lengths), max(self.lengths) + columns)

    def beyond(self, leaf: int, ahead: int) -> Slot:
        """One leaf's slot for a forward of its own, of one column that stands ``ahead`` tokens behind the end of each
        row, where nobody keeps it: the next forward of all leaves writes there. There is room for it."""
        slot = self.slots[leaf]
        tiles = Tiles(self.batch.settled, self.batch.settled) if self._tiled else None
        slot.begin(Forward([length + ahead for length in self.lengths], 1, 0, self._width_step, tiles))
        return slot

    def rewind(self, counts: Sequence[int]) -> None:
        """Take the last ``counts[i]`` tokens of row i back: such as forwards have written. No forward is under way.

        No position that is further behind the last one ever written than some leaf rewinds may be the next one: what
        that leaf needs is gone. Raises ValueError for counts that go beyond that by themselves.
        """
        if self._forward is not None:
            raise RuntimeError("a forward is under way: advance() says what it keeps")
        most = min(spec.rewinds for spec in self._specs)
        if max(counts, default=0) > most:
            raise ValueError(f"rows cannot go back by {max(counts)} tokens; at most {most}")
        self.batch.rewind(counts)

    def reserve(self, length: int, share: float) -> None:
        """Make room ahead of the adoption of ``length`` tokens, in the first ``share`` (0 to 1) of the layers.

        Growing all layers at once can pause a big batch for seconds; called with a growing share between the chunks
        of a prompt, it is spread over them. An arena without rows has nothing to copy and is left alone.
        """
        if self.lengths:
            row, slots = len(self.lengths), self.slots[: math.ceil(share * len(self.slots))]
            self._reserved = (row + 1, length + 1)
            self._make_room(slots, row + 1, max(length + 1, *self.lengths))
            if self._touched[:2] != (row, length):
                self._touched = (row, length, 0)
            done = self._touched[2]
            some = slots[done : done + math.ceil(len(self.slots) / TOUCHED_AT_ONCE)]
            for slot in some:
                slot.touch(row, length)
            self._touched = (row, length, done + len(some))

    def unreserve(self) -> None:
        """The prompt that room was being made for will not come."""
        self._reserved = (0, 0)

    def trim(self) -> None:
        """Give back what neither rows nor reservation need: everything if there are none. It never shrinks by itself,
        because growing again costs a copy, and fresh memory more than that."""
        if not self.lengths and self._reserved == (0, 0):
            self.slots.clear()
        else:
            longest = max([*(length + 1 for length in self.lengths), self._reserved[1]])
            capacity = capacity_bucket(longest)
            rows = self._row_target(max(len(self.lengths), self._reserved[0]), capacity)
            copies = Copies()
            for slot in self.slots:
                slot.shrink(rows, capacity)
                copies.add(slot.arrays, slot.nbytes)
            copies.wait()

    def _make_room(self, slots: Sequence[Slot], rows: int, longest: int) -> None:
        """Grow those slots that are too small, and then at once to what is reserved: everything is copied anyway."""
        least_capacity = capacity_bucket(longest)
        if small := [slot for slot in slots if not slot.fits(rows, least_capacity)]:
            capacity = max(least_capacity, capacity_bucket(self._reserved[1]))
            target = self._row_target(max(rows, self._reserved[0]), capacity)
            copies = Copies()
            for slot in small:
                slot.resize(max(target, rows), capacity)
                copies.add(slot.arrays, slot.nbytes)
            copies.wait()

    def _row_target(self, rows: int, capacity: int) -> int:
        row_bytes = sum(spec.row_bytes(capacity) for spec in self._specs)
        return rows_allocated(rows, row_bytes, self._limit_bytes)

    def arrays(self) -> list[mx.array]:
        """All that the rows hold."""
        return [array for slot in self.slots for array in slot.arrays]
