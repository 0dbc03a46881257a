"""Slots and arena against a dict of lists: any sequence of adopt, release, write, roll back and grow."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarn.kv.arena import RING_SLACK, Arena, LayerRow, LayerSpec

HEADS, KEY_DIM, VALUE_DIM, WINDOW = 2, 3, 5, 8
SPECS = [
    LayerSpec(HEADS, KEY_DIM, VALUE_DIM, mx.float32, None),
    LayerSpec(HEADS, KEY_DIM, VALUE_DIM, mx.float32, WINDOW),
]


def entries(marks: list[int], dim: int) -> mx.array:
    """[1, heads, len(marks), dim] whose numbers tell mark, head and component apart."""
    mark = np.array(marks, dtype=np.float32).reshape(1, 1, -1, 1)
    head = np.arange(HEADS, dtype=np.float32).reshape(1, -1, 1, 1)
    return mx.array(mark * 100 + head * 10 + np.arange(dim, dtype=np.float32))


class ArenaMachine(RuleBasedStateMachine):
    """``model`` holds, per row, the marks of its positions: what a dict of lists would hold."""

    @initialize()
    def start(self) -> None:
        self.arena = Arena(SPECS)
        self.model: list[list[int]] = []
        self.mark = 0

    def fresh(self, count: int) -> list[int]:
        self.mark += count
        return list(range(self.mark - count, self.mark))

    @rule(length=st.sampled_from([0, 1, 5, 8, 9, 31, 40, 41, 90, 255, 256, 300]))
    @precondition(lambda self: len(self.model) < 6)
    def adopt(self, length: int) -> None:
        marks = self.fresh(length)
        layers = [
            LayerRow(entries(marks, KEY_DIM), entries(marks, VALUE_DIM)),
            LayerRow(entries(marks[-WINDOW:], KEY_DIM), entries(marks[-WINDOW:], VALUE_DIM)),
        ]
        assert self.arena.adopt(layers if length else (), length) == len(self.model)
        self.model.append(marks)

    @rule(choice=st.integers(0, 5), scrub=st.booleans())
    @precondition(lambda self: self.model)
    def release(self, choice: int, scrub: bool) -> None:
        row = choice % len(self.model)
        self.arena.release(row, scrub)
        self.model[row] = self.model[-1]
        self.model.pop()

    @rule(columns=st.integers(1, 4), keep=st.lists(st.integers(0, 4), min_size=6, max_size=6))
    @precondition(lambda self: self.model)
    def write(self, columns: int, keep: list[int]) -> None:
        """A forward of some columns, of which each row keeps some: the rest is rolled back."""
        marks = [self.fresh(columns) for _ in self.model]
        cache = self.arena.begin(columns)
        for slot in cache:
            slot.update_and_fetch(
                mx.concatenate([entries(row, KEY_DIM) for row in marks]),
                mx.concatenate([entries(row, VALUE_DIM) for row in marks]),
            )
        self.check_views(marks, columns)
        kept = [min(keep[row], columns) for row in range(len(self.model))]
        self.arena.advance(kept)
        mx.eval(self.arena.arrays())
        for row, count in enumerate(kept):
            self.model[row] = self.model[row] + marks[row][:count]

    @rule(length=st.sampled_from([5, 300, 600]), share=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    def reserve(self, length: int, share: float) -> None:
        self.arena.reserve(length, share)
        if self.model and share == 1.0:
            assert self.arena.slots[0].capacity > length
            assert all(slot.row_count > len(self.model) for slot in self.arena.slots)

    @rule()
    def trim(self) -> None:
        self.arena.unreserve()
        self.arena.trim()
        if self.model:
            assert self.arena.slots[0].keys.shape[0] < 2 * len(self.model)
        else:
            assert self.arena.nbytes == 0

    def check_views(self, written: list[list[int]], columns: int) -> None:
        """Each query sees exactly the marks it should, through the mask, in every layer."""
        for spec, slot in zip(SPECS, self.arena.slots, strict=True):
            keys, values = slot.keys_and_values()
            mask = slot.make_mask(columns)
            seen_keys, seen_values = np.array(keys), np.array(values)
            for row, marks in enumerate(self.model):
                history = marks + written[row]
                for query in range(columns):
                    visible = history[: len(marks) + query + 1]
                    if spec.window is not None:
                        visible = visible[-spec.window :]
                    shown = np.ones(keys.shape[2], bool) if mask is None else np.array(mask)[row, 0, query]
                    assert sorted(seen_keys[row, 0, shown, 0] // 100) == visible
                    assert sorted(seen_values[row, 1, shown, 4] - 14) == [mark * 100 for mark in visible]

    @invariant()
    def lengths_agree(self) -> None:
        assert list(self.arena.lengths) == [len(marks) for marks in self.model]
        assert self.arena.slots or not self.model
        for spec, slot in zip(SPECS, self.arena.slots, strict=False):
            assert slot.keys.shape[0] >= len(self.model)
            if spec.window is not None:
                assert slot.capacity == WINDOW + RING_SLACK


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_room_is_made_layer_by_layer_ahead_of_an_adoption() -> None:
    """A long prompt's arrival must not copy the whole batch at once, nor may a decode step in between."""
    specs = [LayerSpec(1, 4, 4, mx.float32, None)] * 4
    arena = Arena(specs)
    arena.adopt((), 0)
    for quarter in range(1, 5):
        arena.reserve(2000, quarter / 4)
        arena.begin(1)
        arena.advance([1])
        assert [slot.capacity for slot in arena.slots] == [2048] * quarter + [256] * (4 - quarter)
    arrays = [slot.keys for slot in arena.slots]
    layer = LayerRow(mx.ones((1, 1, 2000, 4)), mx.ones((1, 1, 2000, 4)))
    arena.adopt([layer] * 4, 2000)
    assert [slot.keys.shape for slot in arena.slots] == [array.shape for array in arrays]


def test_aligned_rows_need_no_mask() -> None:
    arena = Arena(SPECS[:1])
    for _ in range(2):
        arena.adopt([LayerRow(entries([1, 2, 3], KEY_DIM), entries([1, 2, 3], VALUE_DIM))], 3)
    (slot,) = arena.begin(1)
    assert slot.make_mask(1) is None


def test_scrub_removes_non_finite_numbers() -> None:
    arena = Arena(SPECS[:1])
    poison = mx.full((1, HEADS, 4, KEY_DIM), float("nan")), mx.full((1, HEADS, 4, VALUE_DIM), float("nan"))
    arena.adopt([LayerRow(entries([1], KEY_DIM), entries([1], VALUE_DIM))], 1)
    arena.adopt([LayerRow(*poison)], 4)
    arena.release(1, scrub=True)
    assert all(bool(mx.isfinite(array).all()) for array in arena.arrays())


def test_arrays_are_written_in_place() -> None:
    """The donation canary in small: many writes must not allocate a second arena."""
    arena = Arena([LayerSpec(4, 64, 64, mx.float32, None)] * 2)
    arena.adopt((), 0)
    arena.advance([4000])
    arena.begin(1)
    arena.advance([0])
    mx.eval(arena.arrays())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    one = mx.ones((1, 4, 1, 64))
    for _ in range(10):
        for slot in arena.begin(1):
            keys, values = slot.update_and_fetch(one, one)
            mx.eval((keys[..., -1:, :] * values[..., -1:, :]).sum())
            del keys, values
        arena.advance([1])
    assert mx.get_peak_memory() - before < arena.nbytes // 4
