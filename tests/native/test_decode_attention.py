"""Attention over slots in C: any story of rows that join, are rolled back, grow, move and leave, against float64."""

from __future__ import annotations

import pytest

from millpond.native.library import prepared

if prepared() is None:
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from slot_story import SCALE, Floats, Layer, Past, adopt, alone, drawn, expected, filled, forward, queries_of

from millpond.kv.arena import Arena
from millpond.kv.slots import RING_SLACK
from millpond.model.cpu_math import LOG2_E
from millpond.native import decode
from millpond.types import KvPacking

INT8 = KvPacking(bits=8, group_size=32)
INT4 = KvPacking(bits=4, group_size=32)
LAYERS = {
    "float32": Layer(),
    "float32, window": Layer(window=40),
    "int8": Layer(INT8),
    "int8, window": Layer(INT8, window=40, sharing=4),
    "int4": Layer(INT4, sharing=1, key_dim=32, value_dim=96),
    "int4, window beyond a piece": Layer(INT4, window=700, groups=1),
    "int8, exact start": Layer(KvPacking(bits=8, group_size=32, start=64), sharing=4),
    "int8, exact start beyond the first capacity": Layer(KvPacking(bits=8, group_size=32, start=320), groups=1),
    "int8, exact window": Layer(KvPacking(bits=8, group_size=32, start=64), window=100),
    "rotated": Layer(KvPacking(bits=4, group_size=32, start=64, rotated=True)),
    "rotated, odd head": Layer(KvPacking(bits=4, group_size=32, start=128, rotated=True), key_dim=96, value_dim=64),
    "odd sizes": Layer(groups=3, key_dim=20, value_dim=13),
    "int8 in groups of a head": Layer(KvPacking(bits=8, group_size=128), key_dim=128, value_dim=128, groups=1),
}
LENGTHS = [0, 1, 5, 38, 39, 40, 62, 63, 64, 65, 127, 128, 250, 255, 256, 318, 510, 511, 512, 513, 700, 1021, 1210]


@pytest.fixture(autouse=True, scope="module")
def in_c() -> None:
    assert decode.available(), "it has to be what is tested"


def assert_close(ours: Floats, reference: npt.NDArray[np.float64]) -> None:
    assert np.abs(ours - reference).max() < 2e-5


class Story(RuleBasedStateMachine):
    """``pasts`` holds, per row, what a dict of lists would hold."""

    layer: Layer

    @initialize(seed=st.integers(0, 99))
    def start(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.arena = Arena([self.layer.spec])
        self.pasts: list[Past] = []

    @rule(length=st.sampled_from(LENGTHS))
    @precondition(lambda self: len(self.pasts) < 5)
    def adopt(self, length: int) -> None:
        self.pasts.append(drawn(self.layer, self.rng, length))
        adopt(self.arena, self.layer, self.pasts[-1])

    @rule(
        columns=st.integers(1, 5), refused=st.lists(st.integers(0, 5), min_size=5, max_size=5), times=st.integers(1, 3)
    )
    @precondition(lambda self: self.pasts)
    def write(self, columns: int, refused: list[int], times: int) -> None:
        """Forwards of some columns, of which each row keeps some: the rest is rolled back."""
        for _ in range(times):
            new = [drawn(self.layer, self.rng, columns) for _ in self.pasts]
            queries = queries_of(self.layer, self.rng, len(new), columns)
            result = np.array(forward(self.arena, new, queries))
            assert result.shape == (len(new), self.layer.heads, columns, self.layer.value_dim)
            for row, past in enumerate(self.pasts):
                assert_close(result[row], expected(self.layer, past.followed_by(new[row]), queries[row]))
            row = int(self.rng.integers(len(new)))
            assert np.array_equal(result[row], alone(self.layer, self.pasts[row], new[row], queries[row]))
            counts = [max(0, columns - refused[row]) for row in range(len(new))]
            self.arena.advance(counts)
            self.pasts = [
                past.followed_by(added.cut(0, count))
                for past, added, count in zip(self.pasts, new, counts, strict=True)
            ]
            assert self.arena.lengths == [past.length for past in self.pasts]

    @rule(choice=st.integers(0, 4), scrub=st.booleans())
    @precondition(lambda self: self.pasts)
    def release(self, choice: int, scrub: bool) -> None:
        row = choice % len(self.pasts)
        self.arena.release(self.arena.batch.names[row], scrub)
        self.pasts[row] = self.pasts[-1]
        self.pasts.pop()

    @rule(length=st.sampled_from([5, 300, 1500]), share=st.sampled_from([0.0, 1.0]))
    def reserve(self, length: int, share: float) -> None:
        self.arena.reserve(length, share)

    @rule()
    def trim(self) -> None:
        self.arena.unreserve()
        self.arena.trim()


@pytest.mark.often("float32", "int4", "odd", "int8, window")
@pytest.mark.parametrize("name", LAYERS)
def test_any_story(name: str) -> None:
    class OfLayer(Story):
        layer = LAYERS[name]

    steps = settings(max_examples=25, stateful_step_count=20, deadline=None)
    run_state_machine_as_test(OfLayer, settings=steps)


@pytest.mark.parametrize("change", ["put", "drop", "scrub"])
def test_slots_that_had_to_move_are_found_again(change: str) -> None:
    """Whoever holds an array makes MLX copy it when a row changes: what C is told of before is the old one."""
    layer = LAYERS["float32"]
    arena, new, queries = filled(layer, 30, 63, 90)
    mx.eval(forward(arena, new, queries))
    arena.advance([0, 0, 0])
    held = [array[:1] for array in arena.arrays()]
    mx.eval(held)
    arena.release(arena.batch.names[0 if change == "drop" else 2], scrub=change == "scrub")
    if change == "put":
        adopt(arena, layer, new[0])
    else:
        arena.put("empty", (), 0)
    again = [drawn(layer, np.random.default_rng(row), 1) for row in range(len(arena.lengths))]
    mx.eval(forward(arena, again, queries_of(layer, np.random.default_rng(3), len(again), 1)))
    for row, length in enumerate(arena.lengths):
        assert np.array_equal(np.array(arena.slots[0].span(row, length, length + 1, length + 1)[0])[0], again[row].keys)
    assert held


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_ragged_rows_at_every_border(name: str, columns: int) -> None:
    """All lengths in one forward, and every row with the bits that it has alone."""
    layer, rng = LAYERS[name], np.random.default_rng(1)
    pasts = [drawn(layer, rng, length) for length in LENGTHS]
    arena = Arena([layer.spec])
    for past in pasts:
        adopt(arena, layer, past)
    new = [drawn(layer, rng, columns) for _ in pasts]
    queries = queries_of(layer, rng, len(pasts), columns)
    result = np.array(forward(arena, new, queries))
    for row, past in enumerate(pasts):
        assert_close(result[row], expected(layer, past.followed_by(new[row]), queries[row]))
        assert np.array_equal(result[row], alone(layer, past, new[row], queries[row])), past.length


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.window])
def test_a_ring_goes_round_several_times(name: str) -> None:
    layer, rng = LAYERS[name], np.random.default_rng(2)
    arena, pasts = Arena([layer.spec]), [drawn(layer, rng, length) for length in (0, 17)]
    for past in pasts:
        adopt(arena, layer, past)
    assert layer.window is not None
    while pasts[0].length < 3 * (layer.window + RING_SLACK):
        new = [drawn(layer, rng, RING_SLACK) for _ in pasts]
        queries = queries_of(layer, rng, 2, RING_SLACK)
        result = np.array(forward(arena, new, queries))
        for row, past in enumerate(pasts):
            assert_close(result[row], expected(layer, past.followed_by(new[row]), queries[row]))
        counts = [RING_SLACK - 1, RING_SLACK - 5]
        arena.advance(counts)
        pasts = [pasts[row].followed_by(new[row].cut(0, counts[row])) for row in range(2)]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_without_keys_of_its_own_attends_to_what_is_there(name: str) -> None:
    """Layers that share the keys of an earlier one (Gemma 3n) write nothing, and so does a second look."""
    layer, rng = LAYERS[name], np.random.default_rng(3)
    arena, pasts = Arena([layer.spec]), [drawn(layer, rng, length) for length in (70, 600)]
    for past in pasts:
        adopt(arena, layer, past)
    new, queries = [drawn(layer, rng, 2) for _ in pasts], queries_of(layer, rng, 2, 2)
    first = forward(arena, new, queries)
    second = arena.slots[0].attend(mx.array(queries), SCALE * LOG2_E)
    mx.eval(first)
    assert mx.array_equal(first, second)


@pytest.mark.parametrize("name", ["float32", "int8, window", "int8, exact start"])
def test_a_call_stays_lazy_until_it_is_evaluated(name: str) -> None:
    arena, new, queries = filled(LAYERS[name], 30, 63, 64, 300)
    before = [np.array(array) for array in arena.arrays()]
    result = forward(arena, new, queries)
    assert all(np.array_equal(was, array) for was, array in zip(before, arena.arrays(), strict=True))
    mx.eval(result)
    changed = [not np.array_equal(was, array) for was, array in zip(before, arena.arrays(), strict=True)]
    assert all(changed), "keys and values of every segment"
    (slot,) = arena.slots
    for row, length in enumerate((30, 63, 64, 300)):
        arrays = slot.span(row, length, length + 1, length + 1)
        exact = len(arrays) == 2
        written = arrays if exact else slot.spec.format.unpack(tuple(mx.contiguous(array) for array in arrays))
        for side, past in zip(written, (new[row].keys, new[row].values), strict=True):
            assert np.abs(np.array(side)[0] - past).max() <= (0.0 if exact else 0.02)


def test_nothing_but_the_new_positions_is_written() -> None:
    arena, new, queries = filled(LAYERS["int8"], 10, 90)
    before = [np.array(array) for array in arena.arrays()]
    mx.eval(forward(arena, new, queries))
    for was, array in zip(before, arena.arrays(), strict=True):
        now = np.array(array)
        for row, length in enumerate((10, 90)):
            now[row, :, length] = was[row, :, length]
        assert np.array_equal(now, was)


@pytest.mark.parametrize("peak", [0, 63, 64, 511, 512, 699, 700])
@pytest.mark.parametrize("level", [-3000.0, 3000.0])
@pytest.mark.parametrize("name", ["float32", "int8", "int8, exact start"])
def test_extreme_scores_stay_finite(name: str, level: float, peak: int) -> None:
    """All far from zero, and wherever the largest is, the pieces before and behind it count for nothing."""
    layer, rng = LAYERS[name], np.random.default_rng(8)
    whole = drawn(layer, rng, 701)
    whole.keys[:] = 0
    whole.keys[:, :, 0] = level
    whole.keys[:, peak, 0] += 500
    queries = np.zeros((1, layer.heads, 1, layer.key_dim), np.float32)
    queries[..., 0] = 1 / SCALE
    arena = Arena([layer.spec])
    adopt(arena, layer, whole.cut(0, 700))
    result = np.array(forward(arena, [whole.cut(700, 701)], queries))[0]
    assert_close(result, expected(layer, whole, queries[0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_not_a_number_stays_in_its_row(name: str, bad: float) -> None:
    """A sick row has to reach the logits, where the engine looks for it, and nobody else's."""
    layer = LAYERS[name]
    arena, new, queries = filled(layer, 100, 100, 600)
    sound = np.array(forward(arena, new, queries))
    arena.advance([0, 0, 0])
    new[1].keys[0, 0, 3] = bad
    new[1].values[0, 0, 3] = bad
    sick = np.array(forward(arena, new, queries))
    assert np.array_equal(sick[[0, 2]], sound[[0, 2]])
    assert not np.isfinite(sick[1, : layer.sharing]).all(axis=-1).any(), "every query that shares the key head"
    assert np.array_equal(sick[1, layer.sharing :], sound[1, layer.sharing :])
    arena.advance([1, 1, 1])
    arena.release(arena.batch.names[1], scrub=True)
    rng = np.random.default_rng(5)
    past, third, again = drawn(layer, rng, 3), drawn(layer, rng, 1), queries_of(layer, rng, 3, 1)
    adopt(arena, layer, past)
    healthy = np.array(forward(arena, [*new[:1], *new[2:], third], again))
    assert_close(healthy[2], expected(layer, past.followed_by(third), again[2]))
    assert np.isfinite(healthy).all()


DIGEST = """
import hashlib, sys
from millpond.model import blas
blas.prepare()
import numpy as np
from slot_story import *
found = hashlib.sha256()
for packing in (KvPacking(), KvPacking(bits=8, group_size=32)):
    layer, rng = Layer(packing, groups=4), np.random.default_rng(1)
    pasts = [drawn(layer, rng, length) for length in (0, 300, 1000, 2100)]
    arena = Arena([layer.spec])
    for past in pasts:
        adopt(arena, layer, past)
    for columns in (1, 4):
        new = [drawn(layer, rng, columns) for _ in pasts]
        found.update(np.array(forward(arena, new, queries_of(layer, rng, 4, columns))).tobytes())
        arena.advance([columns] * 4)
print(found.hexdigest())
"""


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    found = set()
    for threads in ("1", "2", "5"):
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": paths}
        command = [sys.executable, "-c", DIGEST]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stderr
        found.add(ran.stdout)
    assert len(found) == 1
