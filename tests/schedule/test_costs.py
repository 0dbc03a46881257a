"""The cost model: defaults, convergence, robustness, and the inverse used to size chunks."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.schedule.costs import CostModel

MACHINES = [
    pytest.param((30.0, 1.2, 4e-4), (40.0, 5.0, 2e-3), id="cpu"),
    pytest.param((2.0, 0.05, 1e-6), (6.0, 0.2, 2e-4), id="gpu"),
    pytest.param((0.0, 0.1, 0.0), (10.0, 0.0, 0.0), id="no-extras"),
]
Triple = tuple[float, float, float]


def true_prefill(machine: Triple, start: int, tokens: int) -> float:
    fixed, linear, attention = machine
    return fixed + tokens * (linear + attention * (start + tokens / 2))


def true_decode(machine: Triple, rows: int, context: int) -> float:
    return machine[0] + machine[1] * rows + machine[2] * context


def test_defaults_are_positive_and_grow() -> None:
    costs = CostModel()
    assert 0 < costs.prefill_ms(0, 64) < costs.prefill_ms(0, 128) < 10_000
    assert 0 < costs.decode_ms(1, 10) <= costs.decode_ms(8, 800) < 10_000
    assert costs.prefill_ms(500, 0) == 0
    assert costs.decode_ms(0, 0) == 0
    assert costs.tokens_within(0, costs.prefill_ms(0, 640)) in (639, 640)


def test_the_first_observation_sets_the_speed() -> None:
    costs = CostModel()
    costs.observe_prefill(0, 500, 50.0)
    costs.observe_decode(1, 100, 7.0)
    assert costs.prefill_ms(0, 500) == pytest.approx(50.0, rel=0.01)
    assert costs.decode_ms(1, 100) == pytest.approx(7.0, rel=0.01)


@pytest.mark.parametrize(("prefill", "decode"), MACHINES)
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_converges_within_a_few_noisy_observations(prefill: Triple, decode: Triple, noise: float) -> None:
    """The first call is eight times too slow, and one in thirty is hit by a pause."""
    errors: list[float] = []
    for seed in range(20):
        rng, costs = random.Random(seed), CostModel()

        def noisy(ms: float, rng: random.Random = rng) -> float:
            return ms * rng.lognormvariate(0, noise) * (rng.uniform(3, 20) if rng.random() < 1 / 30 else 1.0)

        for turn in range(40):
            start, tokens = rng.choice([0, 0, 64, 512, 4096]), rng.choice([10, 40, 64, 128, 256, 512])
            rows = rng.randint(1, 16)
            context = rows * rng.randint(50, 2000)
            if turn >= 10:
                truth = true_prefill(prefill, start, tokens)
                errors.append(abs(costs.prefill_ms(start, tokens) / truth - 1))
                truth = true_decode(decode, rows, context)
                errors.append(abs(costs.decode_ms(rows, context) / truth - 1))
            compiling = 8.0 if turn == 0 else 1.0
            costs.observe_prefill(start, tokens, compiling * noisy(true_prefill(prefill, start, tokens)))
            costs.observe_decode(rows, context, compiling * noisy(true_decode(decode, rows, context)))
    errors.sort()
    assert statistics.median(errors) < 0.05
    assert errors[int(0.95 * len(errors))] < 0.25


def test_one_pause_changes_little_and_a_lasting_change_is_followed() -> None:
    costs = CostModel()
    for step in range(40):
        costs.observe_decode(8, 1000 + 8 * step, 50.0)
    costs.observe_decode(8, 1320, 2000.0)
    assert costs.decode_ms(8, 1320) == pytest.approx(50.0, rel=0.05)
    for step in range(4):
        costs.observe_decode(8, 1328 + 8 * step, 500.0)
    assert costs.decode_ms(8, 1360) == pytest.approx(500.0, rel=0.1)
    for step in range(4):
        costs.observe_decode(8, 1360 + 8 * step, 50.0)
    assert costs.decode_ms(8, 1400) == pytest.approx(50.0, rel=0.5)


def test_times_that_cannot_be_are_ignored() -> None:
    costs = CostModel()
    before = costs.prefill_ms(0, 100), costs.decode_ms(2, 100)
    for ms in (0.0, -1.0, math.nan, math.inf):
        costs.observe_prefill(0, 100, ms)
        costs.observe_decode(2, 100, ms)
    costs.observe_prefill(0, 0, 5.0)
    costs.observe_decode(0, 0, 5.0)
    assert (costs.prefill_ms(0, 100), costs.decode_ms(2, 100)) == before


observations = st.lists(
    st.tuples(
        st.integers(0, 200_000),
        st.integers(1, 20_000),
        st.integers(1, 256),
        st.floats(1e-3, 1e6),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(observations, st.integers(0, 200_000), st.floats(-10.0, 1e6))
def test_predictions_stay_sane_whatever_is_observed(
    seen: list[tuple[int, int, int, float]], start: int, within: float
) -> None:
    costs = CostModel()
    for begin, tokens, rows, ms in seen:
        costs.observe_prefill(begin, tokens, ms)
        costs.observe_decode(rows, begin, ms)
    for model in (costs.prefill_ms, costs.decode_ms):
        values = [model(3, 1), model(3, 64), model(200, 64), model(200, 4096)]
        assert all(0.0 <= value < math.inf for value in values)
        assert values == sorted(values)
    count = costs.tokens_within(start, within)
    assert count >= 0
    if 0 < count < 1 << 40:
        assert costs.prefill_ms(start, count) <= within * (1 + 1e-6) + 1e-6
        assert costs.prefill_ms(start, count + 2) >= within * (1 - 1e-6) - 1e-6
    assert costs.tokens_within(start, math.inf) >= 1 << 40
    assert costs.tokens_within(start, -math.inf) == 0
