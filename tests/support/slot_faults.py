"""Ways in which rows in slots may go wrong, each put into the running code; the probe has to notice every one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import pytest

from millpond.kv import states
from millpond.kv.leaf import LeafRow
from millpond.kv.rows import Forward
from millpond.kv.segment import KvSegment
from millpond.kv.slots import KvSlot
from millpond.kv.states import Notes, Recurrence, StateSlot
from millpond.model.layers import Known, Turns

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where that can matter."""

    name: str
    patch: Patch
    touches: str
    """Kinds of leaves: kv, window, state, or convolution; of those that forwards kept in part only: behind a +."""


def _wider_window(patch: pytest.MonkeyPatch, more: int) -> None:
    built, job = Forward._build_mask, KvSlot._job

    def mask(self: Forward, window: int | None, capacity: int, *, chunked: bool = False) -> mx.array | None:
        return built(self, window and window + more, capacity, chunked=chunked)

    def wider_job(self: KvSlot, shape: tuple[int, int, int, int], scale: float, writes: bool) -> bytes:
        own = self.window
        try:
            self.window = own and own + more
            return job(self, shape, scale, writes)
        finally:
            self.window = own

    patch.setattr(Forward, "_build_mask", mask)
    patch.setattr(KvSlot, "_job", wider_job)


def _window_too_wide(patch: pytest.MonkeyPatch) -> None:
    _wider_window(patch, 1)


def _window_too_narrow(patch: pytest.MonkeyPatch) -> None:
    _wider_window(patch, -1)


def _stale_mask(patch: pytest.MonkeyPatch) -> None:
    """Rows that have joined or left since are seen as they were."""
    built, known = Forward._build_mask, dict[tuple[object, ...], mx.array | None]()

    def mask(self: Forward, window: int | None, capacity: int, *, chunked: bool = False) -> mx.array | None:
        key = (window, self.n, self.columns, self.width(capacity))
        if key not in known:
            known[key] = built(self, window, capacity, chunked=chunked)
        return known[key]

    patch.setattr(Forward, "_build_mask", mask)


def _placed_by_the_longest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Forward, "offset", property(lambda self: mx.array([self.longest] * self.rows, dtype=mx.int32)))


def _one_position_on(patch: pytest.MonkeyPatch) -> None:
    whole = Forward.offset.func  # type: ignore[attr-defined]
    patch.setattr(Forward, "offset", property(lambda self: whole(self) + 1))
    held, table, told = [], Turns.upto, Known.told

    def upto(self: Turns, positions: int) -> mx.array:
        held.append(mx.contiguous(table(self, positions + 1)[1:]))
        return held[-1]

    def of_steps(self: Known, length: int, slot: KvSlot) -> bytes:
        with pytest.MonkeyPatch.context() as shifted:  # prompts are where they were, or nothing would be off
            shifted.setattr(Turns, "upto", upto)
            return told(self, length, slot)

    patch.setattr(Known, "told", of_steps)


def _keys_not_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KvSegment, "land", lambda *_: None)


def _refused_keys_are_seen(patch: pytest.MonkeyPatch) -> None:
    made = Forward.__init__

    def init(self: Forward, lengths: Sequence[int], columns: int, filled_to: int = 0, width_step: int = 1) -> None:
        made(self, [max(0, length - (columns == 1)) for length in lengths], columns, filled_to, width_step)

    patch.setattr(Forward, "__init__", init)


def _state_not_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StateSlot, "land", lambda *_: None)


def _state_not_adopted(patch: pytest.MonkeyPatch) -> None:
    put = StateSlot.put
    patch.setattr(StateSlot, "put", lambda self, row, _, length: put(self, row, LeafRow(()), length))


def _state_of_a_neighbour(patch: pytest.MonkeyPatch) -> None:
    read = StateSlot.__getitem__
    patch.setattr(StateSlot, "__getitem__", lambda self, index: mx.roll(read(self, index), 1, axis=0))


def _all_is_kept(patch: pytest.MonkeyPatch) -> None:
    keep = StateSlot.keep

    def kept(self: StateSlot, counts: Sequence[int]) -> None:
        columns = 0 if self._forward is None else self._forward.columns
        keep(self, [columns] * len(counts))

    patch.setattr(StateSlot, "keep", kept)


def _nothing_is_kept(patch: pytest.MonkeyPatch) -> None:
    keep = StateSlot.keep

    def kept(self: StateSlot, counts: Sequence[int]) -> None:
        several = self._forward is not None and self._forward.columns > 1
        keep(self, [0] * len(counts) if several else counts)

    patch.setattr(StateSlot, "keep", kept)


def _replayed_too_far(patch: pytest.MonkeyPatch) -> None:
    init = Notes.__init__

    class All(list[Recurrence]):
        def append(self, one: Recurrence) -> None:
            super().append(replace(one, at=lambda _mask, _counts: one.state))

    def noting(self: Notes) -> None:
        init(self)
        self.recurrences = All()

    patch.setattr(Notes, "__init__", noting)


def _convolved_one_short(patch: pytest.MonkeyPatch) -> None:
    behind = states._behind
    patch.setattr(states, "_behind", lambda a, given, kept, n: behind(a, given, mx.maximum(kept - 1, 0), n))


FAULTS = (
    Fault("a window is one too wide", _window_too_wide, "window"),
    Fault("a window is one too narrow", _window_too_narrow, "window"),
    Fault("a mask of another step", _stale_mask, "mask"),
    Fault("all are placed where the longest is", _placed_by_the_longest, "kv"),
    Fault("a position is off by one", _one_position_on, "kv"),
    Fault("keys stay where they were", _keys_not_moved, "kv"),
    Fault("a row is thought one shorter", _refused_keys_are_seen, "kv"),
    Fault("states stay where they were", _state_not_moved, "state"),
    Fault("states are not adopted", _state_not_adopted, "state"),
    Fault("states are those of a neighbour", _state_of_a_neighbour, "state"),
    Fault("refused tokens stay in states", _all_is_kept, "state"),
    Fault("nothing stays in states", _nothing_is_kept, "state"),
    Fault("a recurrence is replayed too far", _replayed_too_far, "recurrence"),
    Fault("a convolution ends one too early", _convolved_one_short, "convolution"),
)
