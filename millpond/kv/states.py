"""A recurrent layer's states for all rows of the running batch: arrays [rows, ...] that do not grow with the context.

A forward reads the live rows and gives back new arrays of as many. So a step writes nothing in place, there are no
spare rows, and whoever holds an old array holds states that still count: that is how a step is taken back. A row that
joins is put behind the others by a copy of fixed size, one that leaves is overwritten by the last. Of a step of several
columns a part can be kept where it was noted what the layer was given (``model/replay``): the states behind that part
are computed from there, and those behind all of them are never held. Engine thread only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar

import mlx.core as mx

from millpond.kv.format import Arrays
from millpond.kv.leaf import LeafRow
from millpond.kv.rows import Forward
from millpond.memory.budget import CacheSizes
from millpond.prefix.records import Kind


class CannotRollBackError(Exception):
    """A forward of several columns cannot be kept in part by a layer; the probe finds that before any request does."""


Behind = Callable[[mx.array, mx.array], mx.array]
"""(bool [n, m]: which of the first m columns count, int32 [n]: how many) -> the state behind those that count."""


@dataclass(frozen=True, eq=False)
class Recurrence:
    """One call of a recurrence while a forward was built."""

    state: mx.array
    """What it returned."""
    at: Behind


@dataclass
class Notes:
    """What the layer of one slot was given in a forward of several columns."""

    recurrences: list[Recurrence] = field(default_factory=list)
    convolved: list[mx.array] = field(default_factory=list)
    """Inputs of convolutions, [n, kept + columns, channels], in order."""


NOTES: ContextVar[Notes | None] = ContextVar("NOTES", default=None)
"""Those of the layer that is being built: of the slot that was read last. Nothing where nobody wants to know."""


@dataclass(frozen=True)
class StateSpec:
    """What one recurrent layer keeps of a row, whatever the row's length."""

    shapes: tuple[tuple[int, ...], ...]
    """Of each array, without the rows."""
    dtypes: tuple[mx.Dtype, ...]
    holder: Callable[[StateSpec], StateSlot]
    """What models are given."""

    kind: ClassVar[Kind] = Kind.STATE
    rewinds: ClassVar[int] = 0
    deferred: ClassVar[bool] = False
    token_bytes: ClassVar[int] = 0

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return sum(math.prod(shape) * int(dtype.size) for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    @property
    def sizes(self) -> CacheSizes:
        return CacheSizes(token_bytes=0, state_bytes=self.nbytes)

    def row_bytes(self, capacity: int) -> int:  # noqa: ARG002 - it does not grow
        """Bytes of room for a row: none is kept."""
        return 0

    def slot(self, leaf: LeafRow, length: int, capacity: int) -> StateSlot:  # noqa: ARG002 - the same
        """One row of ``length`` tokens that holds ``leaf``."""
        slot = self.holder(self)
        slot.put(0, leaf, length)
        return slot

    def nothing(self) -> list[mx.array]:
        """The states of a row of no tokens, [1, ...] each."""
        return [mx.zeros((1, *shape), dtype=dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]


class StateSlot:
    """The states of all rows. What models see adds the class that mlx-lm's models look for."""

    kind = Kind.STATE
    cache: list[mx.array]
    """The live rows' states, and perhaps some of rows that have left behind them; mlx-lm's name."""

    def __init__(self, spec: StateSpec) -> None:
        self.spec = spec
        self.cache = [array[:0] for array in spec.nothing()]
        self._forward: Forward | None = None
        self._before: list[mx.array] = []
        """As they were before the forward under way."""
        self._notes: Notes | None = None
        self._behind: dict[int, Behind] = {}
        """Of arrays that a recurrence has made in the forward under way."""

    @property
    def row_count(self) -> int:
        return int(self.cache[0].shape[0])

    @property
    def nbytes(self) -> int:
        return sum(int(array.nbytes) for array in self.cache)

    @property
    def arrays(self) -> list[mx.array]:
        return list(self.cache)

    # --- what models ask of a cache ---

    def __getitem__(self, index: int) -> mx.array:
        """One array of the rows of the forward under way. IndexError beyond the last is how models take them apart."""
        array = self.cache[index]
        if index in self._behind and self._forward is not None:
            counts = [self._forward.columns] * self._forward.n
            array = self._behind[index](*_counting(counts))
        NOTES.set(self._notes)
        return self._filled(self._live(array))

    def __setitem__(self, index: int, value: mx.array) -> None:
        value = self._live(value)
        made = None
        if self._notes is not None:
            made = next((one for one in self._notes.recurrences if one.state is value), None)
        if made is None or self._notes is None:
            self.cache[index] = value
        else:
            # Whoever held the new state would hold a second copy of all states until the step has been read.
            self._notes.recurrences.remove(made)
            self._behind[index] = made.at

    # --- a forward ---

    def begin(self, forward: Forward) -> None:
        self._forward = forward
        self._before = [self._live(array) for array in self.cache]
        self._notes = Notes() if forward.columns > 1 else None
        self._behind = {}

    def keep(self, counts: Sequence[int]) -> None:
        """Raises CannotRollBackError where it cannot be kept in part."""
        forward, before, notes, behind = self._forward, self._before, self._notes, self._behind
        self._forward, self._before, self._notes, self._behind = None, [], None, {}
        if forward is None:
            return
        if not any(counts):
            self.cache = before
            return
        whole = all(count == forward.columns for count in counts)
        if notes is None and not whole:
            raise CannotRollBackError("one column is kept by some rows and not by others")
        counted, kept = _counting(counts)
        convolved = [] if notes is None or whole else list(notes.convolved)
        after = []
        for index, array in enumerate(self.cache):
            if index in behind:
                after.append(behind[index](counted, kept))
            else:
                after.append(array if whole else _behind(array, convolved, kept, forward.columns))
        if convolved:
            raise CannotRollBackError("a convolution was computed whose inputs no state holds")
        self.cache = after

    def _live(self, array: mx.array) -> mx.array:
        assert self._forward is not None, "no forward under way"
        n = self._forward.n
        return array if array.shape[0] == n else array[:n]

    def _filled(self, array: mx.array) -> mx.array:
        """With rows that hold nothing behind the live ones, as many as the forward has."""
        assert self._forward is not None
        missing = self._forward.rows - int(array.shape[0])
        if not missing:
            return array
        return mx.concatenate([array, mx.zeros((missing, *array.shape[1:]), dtype=array.dtype)])

    # --- rows ---

    def put(self, row: int, leaf: LeafRow, length: int) -> int:  # noqa: ARG002 - a state is of all the tokens there are
        new = list(leaf.arrays) or self.spec.nothing()
        new = [_widened(array, shape) for array, shape in zip(new, self.spec.shapes, strict=True)]
        shapes = tuple(tuple(array.shape[1:]) for array in new)
        if shapes != self.spec.shapes:
            raise ValueError(f"states of {shapes} do not fit rows of {self.spec.shapes}")
        for index, (array, dtype) in enumerate(zip(new, self.spec.dtypes, strict=True)):
            held, array = self.cache[index], array.astype(dtype)
            if held.shape[0] > row:
                self.cache[index] = _replaced(held, row, array)
            else:
                self.cache[index] = mx.concatenate([held, array]) if row else _copied(array, 0)
        return self.nbytes

    def span(self, row: int, start: int, end: int, length: int) -> Arrays:  # noqa: ARG002 - a state is of now
        return tuple(_copied(array, row) for array in self.cache)

    def lift(self, row: int, length: int) -> Sequence[Arrays]:
        return [self.span(row, 0, length, length)]

    def land(self, row: int, lifted: Sequence[Arrays]) -> None:
        (arrays,) = lifted
        self.cache = [_replaced(held, row, array) for held, array in zip(self.cache, arrays, strict=True)]

    def scrub(self, row: int) -> None:
        self.land(row, [tuple(self.spec.nothing())])

    # --- room: there is none to make ---

    def fits(self, rows: int, capacity: int) -> bool:  # noqa: ARG002 - it grows when a row joins
        return True

    def resize(self, rows: int, capacity: int) -> None:
        """There is always room."""

    def touch(self, row: int, length: int) -> None:
        """It is there."""

    def shrink(self, rows: int, capacity: int) -> None:  # noqa: ARG002 - it does not depend on lengths
        if self.row_count > rows:
            self.cache = [mx.contiguous(array[:rows]) for array in self.cache]


def _counting(counts: Sequence[int]) -> tuple[mx.array, mx.array]:
    """See Behind."""
    kept = mx.array(list(counts), dtype=mx.int32)
    return mx.arange(max(counts), dtype=mx.int32)[None] < kept[:, None], kept


def _widened(array: mx.array, shape: tuple[int, ...]) -> mx.array:
    """What keeps some tokens, of a prompt of fewer: zeros before them, as where there is nothing."""
    missing = shape[0] - int(array.shape[1]) if array.ndim == len(shape) + 1 == 2 else 0
    return mx.pad(array, [(0, 0), (missing, 0)]) if missing > 0 else array


def _copied(array: mx.array, row: int) -> mx.array:
    """A row in memory of its own: a view could keep all the activations of a chunk alive."""
    return mx.take(array, mx.array([row], dtype=mx.uint32), axis=0)


def _replaced(array: mx.array, row: int, new: mx.array) -> mx.array:
    """Another array, in place where nobody else holds this one."""
    return mx.slice_update(array, new, mx.array([row], dtype=mx.uint32), axes=[0])


def _behind(array: mx.array, convolved: list[mx.array], kept: mx.array, columns: int) -> mx.array:
    """The last inputs of the next convolution behind ``kept`` columns."""
    if not convolved or array.ndim != 3:
        raise CannotRollBackError("nobody knows how a state came about")
    given, size = convolved.pop(0), int(array.shape[1])
    if tuple(given.shape[1:]) != (size + columns, int(array.shape[2])):
        raise CannotRollBackError("the state of a convolution is not its last inputs")
    places = kept[:, None] + mx.arange(size, dtype=mx.int32)
    return mx.take_along_axis(given, places[..., None], axis=1)
