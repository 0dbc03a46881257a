"""Recurrent states of many rows beside what each row's own list of inputs says (A2, D1)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from millpond.kv import arena as arena_module
from millpond.kv.arena import Arena
from millpond.kv.leaf import LeafRow
from millpond.kv.states import NOTES, CannotRollBackError, Notes, Recurrence, StateSlot, StateSpec
from millpond.prefix.records import Kind

CHANNELS, WINDOW, DECAY = 3, 2, 0.5
SPEC = StateSpec(((WINDOW, CHANNELS), (CHANNELS,)), (mx.float32, mx.float32), StateSlot)
Inputs = npt.NDArray[np.float32]


def states_of(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """What a layer keeps of all the inputs [length, CHANNELS] that it has seen: the last ones, and a decaying sum."""
    behind = np.concatenate([np.zeros((WINDOW, CHANNELS), np.float32), inputs])[-WINDOW:]
    total = np.zeros(CHANNELS, np.float32)
    for one in inputs:
        total = DECAY * total + one
    return behind, total


def recurrence(total: mx.array, x: mx.array, counted: mx.array | None = None) -> mx.array:
    for column in range(x.shape[1]):
        new = DECAY * total + x[:, column]
        total = new if counted is None else mx.where(counted[:, column, None], new, total)
    return total


def layer(slot: StateSlot, x: mx.array) -> None:
    """As a recurrent layer uses its cache, and what ``model/replay`` notes. ``x``: [n, columns, CHANNELS]."""
    window, total = slot[0], slot[1]
    given = mx.concatenate([window, x], axis=1)
    notes = NOTES.get()
    if notes is not None:
        notes.convolved.append(given)
    slot[0] = given[:, -WINDOW:]
    after = recurrence(total, x)
    if notes is not None:
        notes.recurrences.append(
            Recurrence(after, lambda counted, _: recurrence(total, x[:, : counted.shape[1]], counted))
        )
    slot[1] = after


def drawn(length: int, seed: int) -> Inputs:
    return np.random.default_rng(seed).standard_normal((length, CHANNELS)).astype(np.float32)


def leaf_row(inputs: Inputs) -> LeafRow:
    return LeafRow(tuple(mx.array(state[None]) for state in states_of(inputs)))


class RowsOfStates(RuleBasedStateMachine):
    """Rows come, go and step; some steps are taken back in part."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena([SPEC])
        self.rows: dict[str, Inputs] = {}
        self.seed = 0

    def new(self, length: int) -> Inputs:
        self.seed += 1
        return drawn(length, self.seed)

    @precondition(lambda self: len(self.rows) < 6)
    @rule(length=st.integers(0, 4))
    def join(self, length: int) -> None:
        inputs = self.new(length)
        name = f"r{self.seed}"
        self.arena.put(name, [leaf_row(inputs)] if length else (), length)
        self.rows[name] = inputs

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), scrub=st.booleans())
    def leave(self, data: st.DataObject, scrub: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.rows)))
        self.arena.release(name, scrub)
        del self.rows[name]

    @precondition(lambda self: self.rows)
    @rule(columns=st.integers(1, 4), data=st.data(), read=st.booleans())
    def step(self, columns: int, data: st.DataObject, read: bool) -> None:
        names = self.arena.batch.names
        parts = st.lists(st.integers(0, columns), min_size=len(names), max_size=len(names))
        whole = st.sampled_from([0, columns]).map(lambda count: [count] * len(names))
        counts = data.draw(whole if columns == 1 else parts | whole)
        new = [self.new(columns) for _ in names]
        (slot,) = self.arena.begin(columns)
        assert isinstance(slot, StateSlot)
        layer(slot, mx.array(np.stack(new)))
        NOTES.set(None)
        if read:
            mx.eval(slot.arrays)
        self.arena.advance(counts)
        for name, inputs, count in zip(names, new, counts, strict=True):
            self.rows[name] = np.concatenate([self.rows[name], inputs[:count]])

    @rule()
    def trim(self) -> None:
        self.arena.trim()

    @invariant()
    def each_row_holds_what_it_has_seen(self) -> None:
        for name, inputs in self.rows.items():
            (held,) = self.arena.spans(name, 0, len(inputs), Kind.STATE)
            for ours, expected in zip(held, states_of(inputs), strict=True):
                assert np.allclose(np.array(ours)[0], expected, atol=1e-6), name


RowsOfStates.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_rows_of_states = RowsOfStates.TestCase


def noted() -> tuple[Arena, Notes]:
    """A forward of two columns under way, and what was noted of it."""
    arena, slot = two_rows(2)
    layer(slot, mx.zeros((2, 2, CHANNELS)))
    notes = NOTES.get()
    assert notes is not None
    return arena, notes


def two_rows(columns: int) -> tuple[Arena, StateSlot]:
    arena = Arena([SPEC])
    for name in ("a", "b"):
        arena.put(name, [leaf_row(drawn(3, 1))], 3)
    (slot,) = arena.begin(columns)
    assert isinstance(slot, StateSlot)
    return arena, slot


def test_what_was_not_noted_cannot_be_kept_in_part() -> None:
    """And says so: a state that is almost right would be a wrong answer."""
    arena, slot = two_rows(1)
    layer(slot, mx.zeros((2, 1, CHANNELS)))
    with pytest.raises(CannotRollBackError, match="one column"):
        arena.advance([1, 0])
    arena, slot = two_rows(2)
    slot[1] = slot[1] + 1
    with pytest.raises(CannotRollBackError, match="nobody knows"):
        arena.advance([1, 0])
    arena, notes = noted()
    notes.convolved.append(mx.zeros((2, 4, CHANNELS)))
    with pytest.raises(CannotRollBackError, match="whose inputs no state holds"):
        arena.advance([1, 0])
    arena, notes = noted()
    notes.convolved[0] = notes.convolved[0][:, 1:]
    with pytest.raises(CannotRollBackError, match="not its last inputs"):
        arena.advance([1, 0])
    NOTES.set(None)


def test_states_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit rows"):
        Arena([SPEC]).put("a", [LeafRow((mx.zeros((1, 1, CHANNELS)), mx.zeros((1, CHANNELS))))], 1)


def test_forwards_that_are_filled_up() -> None:
    """Rows behind the live ones hold nothing, and leave nothing."""
    arena, _ = two_rows(1)
    arena.advance([0, 0])
    (slot,) = arena.begin(1, filled_to=5)
    assert isinstance(slot, StateSlot)
    x = mx.ones((5, 1, CHANNELS))
    assert (slot[0].shape[0], slot[1].shape[0]) == (5, 5)
    layer(slot, x)
    arena.advance([1, 1])
    assert slot.row_count == 2
    expected = states_of(np.concatenate([drawn(3, 1), np.ones((1, CHANNELS), np.float32)]))
    (held,) = arena.spans("b", 0, 4, Kind.STATE)
    assert all(np.allclose(np.array(one)[0], other, atol=1e-6) for one, other in zip(held, expected, strict=True))


WIDE = StateSpec(((256, 1024),), (mx.float32,), StateSlot)
LAYERS, ROWS = 8, 8


def test_a_join_copies_layer_by_layer_and_a_leave_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """(D1, N2) States are of fixed size: a join moves what a step moves, and never all layers at once; a leave copies
    the last row into its place."""
    monkeypatch.setattr(arena_module, "AT_ONCE_BYTES", WIDE.nbytes)
    arena = Arena([WIDE] * LAYERS)
    for row in range(ROWS):
        arena.put(f"r{row}", [LeafRow((mx.full((1, 256, 1024), row),)) for _ in range(LAYERS)], 10)
    new = [LeafRow((mx.full((1, 256, 1024), 99.0),)) for _ in range(LAYERS)]
    mx.eval(arena.arrays(), [leaf.arrays for leaf in new])
    assert _peak(lambda: arena.put("new", new, 10)) < (LAYERS + 3 * (ROWS + 1)) * WIDE.nbytes
    assert _peak(lambda: arena.release("r0")) < (LAYERS + 2) * WIDE.nbytes
    assert arena.batch.names == ("new", *(f"r{row}" for row in range(1, ROWS)))
    assert [round(float(arena.arrays()[0][row, 0, 0].item())) for row in range(ROWS)] == [99, *range(1, ROWS)]


def test_a_step_that_is_verified_holds_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """(D1, N3) Until it is known what is kept there are only the states from before; then one layer follows another."""
    monkeypatch.setattr(arena_module, "AT_ONCE_BYTES", 2 * ROWS * WIDE.nbytes)
    arena = Arena([WIDE] * LAYERS)
    for row in range(ROWS):
        arena.put(f"r{row}", [LeafRow((mx.full((1, 256, 1024), row),)) for _ in range(LAYERS)], 10)
    mx.eval(arena.arrays())
    same = mx.eye(1024)  # a product takes so long that memory for all layers would be asked for before it is done
    mx.eval(same)
    read: list[mx.array] = []

    def step() -> None:
        for slot in arena.begin(2):
            assert isinstance(slot, StateSlot)
            total = slot[0]
            notes = NOTES.get()
            assert notes is not None
            after = total + 2
            notes.recurrences.append(
                Recurrence(after, lambda _, kept, total=total: total @ same + kept[:, None, None].astype(mx.float32))
            )
            slot[0] = after
            read.append(after.sum())
            mx.eval(read[-1])
        NOTES.set(None)

    assert _peak(step) < 2 * ROWS * WIDE.nbytes
    arena.advance([1] * ROWS)
    assert _peak(lambda: (arena.begin(1), mx.eval(arena.arrays()))) < 4 * ROWS * WIDE.nbytes
    assert [arena.arrays()[layer][3, 0, 0].item() for layer in range(LAYERS)] == [4.0] * LAYERS


def test_a_state_that_was_left_can_be_read() -> None:
    """Nobody holds it, but how it came about is known. It is not what is kept."""
    arena, _ = noted()
    (slot,) = arena.slots
    assert isinstance(slot, StateSlot)
    x = np.zeros((2, CHANNELS), np.float32)
    assert np.allclose(np.array(slot[1])[0], states_of(np.concatenate([drawn(3, 1), x]))[1], atol=1e-6)
    NOTES.set(None)
    arena.advance([1, 2])
    assert np.allclose(np.array(slot.cache[1])[0], states_of(np.concatenate([drawn(3, 1), x[:1]]))[1], atol=1e-6)


def test_of_two_recurrences_the_second_may_be_left_first() -> None:
    arena, slot = two_rows(2)
    notes = NOTES.get()
    assert notes is None
    slot[1]
    notes = NOTES.get()
    assert notes is not None
    first, second = (mx.full((2, CHANNELS), float(value)) for value in (1, 2))
    for state in (first, second):
        notes.recurrences.append(Recurrence(state, lambda _, kept, state=state: 10 * state))
    slot[1] = second
    NOTES.set(None)
    slot[0] = slot.cache[0]
    arena.advance([2, 2])
    assert np.array_equal(np.array(slot.cache[1]), np.full((2, CHANNELS), 20))


def _peak(work: Callable[[], object]) -> int:
    """Bytes beyond what is held before."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    work()
    mx.synchronize()
    return mx.get_peak_memory() - before
