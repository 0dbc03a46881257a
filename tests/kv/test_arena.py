"""Slots and arena against a dict of lists: any sequence of adopt, release, write, roll back and grow."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millpond.kv import arena as arenas
from millpond.kv.arena import Arena
from millpond.kv.format import Arrays, KvFormat
from millpond.kv.leaf import LeafRow
from millpond.kv.slots import RING_SLACK, KvSlot, KvSpec, RingSpec
from millpond.types import KvPacking

HEADS, KEY_DIM, VALUE_DIM, WINDOW = 2, 3, 5, 8
SPECS = [
    KvSpec(HEADS, KEY_DIM, VALUE_DIM, mx.float32),
    RingSpec(HEADS, KEY_DIM, VALUE_DIM, mx.float32, window=WINDOW),
]
RAMP = 0.25


def packed_specs(bits: int, start: int = 0) -> list[KvSpec]:
    form = KvFormat(KvPacking(bits=bits, group_size=32, start=start))
    sizes = (HEADS, 32, 64, mx.float32, form)
    return [KvSpec(*sizes), RingSpec(*sizes, window=WINDOW)]


def entries(marks: list[int], dim: int) -> mx.array:
    """[1, heads, len(marks), dim] whose numbers tell mark, head and component apart."""
    mark = np.array(marks, dtype=np.float32).reshape(1, 1, -1, 1)
    head = np.arange(HEADS, dtype=np.float32).reshape(1, -1, 1, 1)
    return mx.array(mark * 100 + head * 20 + np.arange(dim, dtype=np.float32) * np.float32(RAMP))


def leaf_row(spec: KvSpec, marks: list[int]) -> LeafRow:
    """A finished prompt, as the slots of a layer take it."""
    behind = marks[-spec.window :] if isinstance(spec, RingSpec) else marks[spec.exact :]
    before = marks[: spec.exact]
    arrays: Arrays = (entries(behind, spec.key_dim), entries(behind, spec.value_dim))
    if spec.format.packs:
        arrays = spec.format.pack(*arrays) if behind else ()
    return LeafRow(arrays, exact=(entries(before, spec.key_dim), entries(before, spec.value_dim)) if before else ())


def seen_by(slot: KvSlot) -> list[npt.NDArray[np.float32]]:
    """Keys and values [n, heads, width, dim] of all segments, unpacked."""
    sides: list[list[mx.array]] = [[], []]
    for segment in slot.sides():
        for found, arrays in zip(sides, segment, strict=True):
            if len(arrays) == 3 and arrays[0].size:
                packing = slot.spec.format.packing
                found.append(mx.dequantize(*arrays, group_size=packing.group_size, bits=packing.bits))
            elif len(arrays) == 1:
                found.append(arrays[0])
    return [np.array(mx.concatenate(parts, axis=2)) for parts in sides]


class ArenaMachine(RuleBasedStateMachine):
    """``model`` holds, per row, the marks of its positions: what a dict of lists would hold."""

    specs = SPECS
    tolerance = 0.0
    """By how much packing may change a number; a mark is 100 apart from the next."""

    @initialize()
    def start(self) -> None:
        self.arena = Arena(self.specs)
        self.model: list[list[int]] = []
        self.names = map(str, itertools.count())
        self.written: list[tuple[int, int]] = []
        """Per row how many positions it began with, and how many have ever been written: how far it can go back."""
        self.mark = 0

    def fresh(self, count: int) -> list[int]:
        self.mark += count
        return list(range(self.mark - count, self.mark))

    @rule(length=st.sampled_from([0, 1, 5, 8, 9, 31, 40, 41, 90, 255, 256, 300, 520]))
    @precondition(lambda self: len(self.model) < 6)
    def adopt(self, length: int) -> None:
        marks = self.fresh(length)
        layers = [leaf_row(spec, marks) for spec in self.specs]
        assert self.arena.put(next(self.names), layers if length else (), length) == len(self.model)
        self.model.append(marks)
        self.written.append((length, length))

    @rule(choice=st.integers(0, 5), scrub=st.booleans())
    @precondition(lambda self: self.model)
    def release(self, choice: int, scrub: bool) -> None:
        row = choice % len(self.model)
        self.arena.release(self.arena.batch.names[row], scrub)
        for rows in (self.model, self.written):
            rows[row] = rows[-1]
            rows.pop()

    @rule(columns=st.sampled_from([1, 2, 3, 4, 17]), keep=st.lists(st.integers(0, 17), min_size=6, max_size=6))
    @precondition(lambda self: self.model)
    def write(self, columns: int, keep: list[int]) -> None:
        """A forward of some columns, of which each row keeps some: the rest is rolled back."""
        marks = [self.fresh(columns) for _ in self.model]
        cache = self.arena.begin(columns)
        for slot in cache:
            slot.update_and_fetch(
                mx.concatenate([entries(row, slot.spec.key_dim) for row in marks]),
                mx.concatenate([entries(row, slot.spec.value_dim) for row in marks]),
            )
        self.check_views(marks, columns)
        kept = [min(keep[row], columns) for row in range(len(self.model))]
        self.arena.advance(kept)
        mx.eval(self.arena.arrays())
        for row, count in enumerate(kept):
            self.written[row] = (self.written[row][0], max(self.written[row][1], len(self.model[row]) + columns))
            self.model[row] = self.model[row] + marks[row][:count]

    @rule(back=st.lists(st.integers(0, RING_SLACK), min_size=6, max_size=6))
    @precondition(lambda self: self.model)
    def rewind(self, back: list[int]) -> None:
        """Rows go back as far as their rings allow: over what was accepted long ago, too."""
        counts = []
        for marks, (adopted, reached), count in zip(self.model, self.written, back, strict=False):
            counts.append(min(count, len(marks) - max(adopted, reached - RING_SLACK - 1)))
        self.arena.rewind(counts)
        self.model = [marks[: len(marks) - count] for marks, count in zip(self.model, counts, strict=True)]

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
            assert self.arena.slots[0].row_count < 2 * len(self.model)
        else:
            assert self.arena.nbytes == 0

    def check_views(self, written: list[list[int]], columns: int) -> None:
        """Each query sees exactly the marks it should, through the mask, in every layer."""
        for spec, slot in zip(self.specs, self.arena.slots, strict=True):
            mask = slot.make_mask(columns)
            for side in seen_by(slot):
                for row, marks in enumerate(self.model):
                    history = marks + written[row]
                    for query in range(columns):
                        visible = history[: len(marks) + query + 1]
                        if isinstance(spec, RingSpec):
                            visible = visible[-spec.window :]
                        shown = np.ones(side.shape[2], bool) if mask is None else np.array(mask)[row, 0, query]
                        found = side[row][:, shown]
                        found = found[:, np.argsort(found[0, :, 0])]
                        expected = np.array(entries(visible, side.shape[3]))[0]
                        assert found.shape == expected.shape
                        assert np.abs(found - expected).max() <= self.tolerance

    @invariant()
    def lengths_agree(self) -> None:
        assert list(self.arena.lengths) == [len(marks) for marks in self.model]
        assert self.arena.slots or not self.model
        for spec, slot in zip(self.specs, self.arena.slots, strict=False):
            assert slot.arrays[0].shape[0] >= len(self.model)
            if isinstance(spec, RingSpec):
                assert slot.capacity == WINDOW + RING_SLACK


class Int8Machine(ArenaMachine):
    specs = packed_specs(8)
    tolerance = 0.2


class Int4Machine(ArenaMachine):
    specs = packed_specs(4)
    tolerance = 0.5


class ExactStartMachine(ArenaMachine):
    specs = packed_specs(8, start=20)
    tolerance = 0.2


class LateStartMachine(ArenaMachine):
    """Nothing is packed before the arena has grown once."""

    specs = packed_specs(8, start=270)
    tolerance = 0.2


TestArena = ArenaMachine.TestCase
TestInt8 = Int8Machine.TestCase
TestInt4 = Int4Machine.TestCase
TestExactStart = ExactStartMachine.TestCase
TestLateStart = LateStartMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
FEWER = settings(max_examples=20, stateful_step_count=25, deadline=None)
TestInt8.settings = TestInt4.settings = TestExactStart.settings = TestLateStart.settings = FEWER


@pytest.mark.parametrize("start", [20, 270])
def test_exact_positions_are_not_packed(start: int) -> None:
    """Not even those that a forward adds, nor after the row has moved and the arena has grown."""
    (spec, _), rng = packed_specs(4, start), np.random.default_rng(0)
    arena = Arena([spec])
    keys, values = (rng.standard_normal((2, HEADS, 300, dim)).astype(np.float32) for dim in (32, 64))
    for length in (1, start - 2):
        exact = mx.array(keys[1:, :, :length]), mx.array(values[1:, :, :length])
        arena.put(str(length), [LeafRow((), exact=exact)], length)
    for counts in ([4, 0], [4, 1], [4, 3]):  # what is refused is written again
        done = arena.lengths[1]
        (slot,) = arena.begin(4)
        slot.update_and_fetch(mx.array(keys[:, :, done : done + 4]), mx.array(values[:, :, done : done + 4]))
        arena.advance(counts)
        mx.eval(arena.arrays())
    arena.release("1")
    arena.begin(300)
    for side, found in zip((keys, values), seen_by(arena.slots[0]), strict=True):
        assert np.array_equal(found[0, :, :start], side[1, :, :start])
        behind = np.abs(found[0, :, start : start + 2] - side[1, :, start : start + 2])
        assert 0 < behind.max() < 0.4


def test_room_is_made_layer_by_layer_ahead_of_an_adoption() -> None:
    """A long prompt's arrival must not copy the whole batch at once, nor may a decode step in between."""
    specs = [KvSpec(1, 4, 4, mx.float32)] * 4
    arena = Arena(specs)
    arena.put("a", (), 0)
    for quarter in range(1, 5):
        arena.reserve(2000, quarter / 4)
        arena.begin(1)
        arena.advance([1])
        assert [slot.capacity for slot in arena.slots] == [2048] * quarter + [256] * (4 - quarter)
    arrays = [slot.arrays[0] for slot in arena.slots]
    layer = LeafRow((mx.ones((1, 1, 2000, 4)), mx.ones((1, 1, 2000, 4))))
    arena.put("b", [layer] * 4, 2000)
    assert [slot.arrays[0].shape for slot in arena.slots] == [array.shape for array in arrays]


def test_aligned_rows_need_no_mask() -> None:
    arena = Arena(SPECS[:1])
    for name in "ab":
        arena.put(name, [LeafRow((entries([1, 2, 3], KEY_DIM), entries([1, 2, 3], VALUE_DIM)))], 3)
    (slot,) = arena.begin(1)
    assert slot.make_mask(1) is None


def test_scrub_removes_non_finite_numbers() -> None:
    arena = Arena(SPECS[:1])
    poison = mx.full((1, HEADS, 4, KEY_DIM), float("nan")), mx.full((1, HEADS, 4, VALUE_DIM), float("nan"))
    arena.put("sound", [LeafRow((entries([1], KEY_DIM), entries([1], VALUE_DIM)))], 1)
    arena.put("poison", [LeafRow(poison)], 4)
    arena.release("poison", scrub=True)
    assert all(bool(mx.isfinite(array).all()) for array in arena.arrays())


def test_arrays_are_written_in_place() -> None:
    """The donation canary in small: many writes must not allocate a second arena."""
    arena = Arena([KvSpec(4, 64, 64, mx.float32)] * 2)
    arena.put("a", (), 0)
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
            assert isinstance(keys, mx.array)
            assert isinstance(values, mx.array)
            mx.eval((keys[..., -1:, :] * values[..., -1:, :]).sum())
            del keys, values
        arena.advance([1])
    assert mx.get_peak_memory() - before < arena.nbytes // 4


@pytest.mark.parametrize("length", [100, 255])
@pytest.mark.parametrize("heads", [1, 2])
def test_joining_and_leaving_cost_one_row(monkeypatch: pytest.MonkeyPatch, heads: int, length: int) -> None:
    """Whoever leaves in the middle is replaced by the last row; nobody else's numbers are copied (D1). Rows with room
    left, and full ones."""
    spec = KvSpec(heads, 64, 64, mx.float32)
    arena, names = Arena([spec] * 3), itertools.count()
    rows, row_bytes = 16, spec.row_bytes(256)
    monkeypatch.setattr(arenas, "AT_ONCE_BYTES", row_bytes)

    def joining() -> None:
        arena.put(str(next(names)), [LeafRow((mx.ones((1, heads, length, 64)),) * 2)] * 3, length)

    def most_bytes(work: Callable[[], object]) -> int:
        """Held at once besides the arena itself."""
        mx.eval(arena.arrays())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        work()
        mx.eval(arena.arrays())
        return mx.get_peak_memory() - before

    for _ in range(rows):
        joining()
    assert arena.nbytes == 3 * rows * row_bytes
    arena.begin(1)
    arena.advance([1] * rows)
    arena.release(str(rows - 1))
    assert most_bytes(joining) < 4 * row_bytes
    for row in (3, 0, rows - 3):
        assert most_bytes(lambda row=row: arena.release(str(row))) < 4 * row_bytes  # type: ignore[misc]
    assert most_bytes(lambda: arena.release("1", scrub=True)) < 4 * row_bytes
