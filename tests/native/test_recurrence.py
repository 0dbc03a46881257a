"""The recurrences in C beside mlx-lm's formulas (N2)."""

from __future__ import annotations

import pytest

from millpond.native.library import prepared

if prepared() is None:
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

import importlib.util
from collections.abc import Callable
from types import ModuleType

import mlx.core as mx
import mlx_lm.models
import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.model import recurrences
from millpond.native import recurrence
from millpond.native.recurrence import COLUMNS, Given, recurrent

Floats = npt.NDArray[np.float32]


def untouched(name: str) -> ModuleType:
    """One of mlx-lm's modules as it is written."""
    spec = importlib.util.spec_from_file_location(f"untouched_{name}", f"{mlx_lm.models.__path__[0]}/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GATED_DELTA, SSM = untouched("gated_delta"), untouched("ssm")
OURS_GATED_DELTA = recurrences.gated_delta(GATED_DELTA)
OURS_SSM = recurrences.state_space(SSM)


class Drawn:
    """Arguments of a recurrence. ``sharing``: value heads of one key head."""

    def __init__(self, seed: int, n: int, length: int, groups: int, sharing: int, keys: int, values: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.n, self.length = n, length
        heads = groups * sharing
        self.q, self.k = (self.normal(n, length, groups, keys) / keys**0.5 for _ in range(2))
        self.v, self.state = self.normal(n, length, heads, values), self.normal(n, heads, values, keys)
        self.g, self.each = (mx.sigmoid(self.normal(n, length, heads, *last)) for last in ((), (keys,)))
        self.beta = mx.sigmoid(self.normal(n, length, heads))
        self.ssm = (self.normal(heads), self.normal(heads), self.normal(n, length, heads), self.normal(heads))

    def normal(self, *shape: int) -> mx.array:
        return mx.array(self._rng.standard_normal(shape).astype(np.float32))

    def kept(self) -> tuple[list[int], mx.array]:
        """How many tokens of each row count, and the mask that says so."""
        counts = [int(count) for count in self._rng.integers(0, self.length + 1, self.n)]
        return counts, mx.arange(self.length)[None] < mx.array(counts)[:, None]


def close(ours: mx.array, theirs: mx.array) -> bool:
    scale = max(1.0, float(mx.abs(theirs).max().item()))
    return ours.shape == theirs.shape and bool(mx.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale).item())


SHAPES = st.builds(
    Drawn,
    seed=st.integers(0, 1000),
    n=st.integers(1, 4),
    length=st.sampled_from([1, 2, 5, COLUMNS, COLUMNS + 3]),
    groups=st.integers(1, 3),
    sharing=st.sampled_from([1, 2, 4]),
    keys=st.sampled_from([4, 7, 16, 20, 64, 128]),
    values=st.sampled_from([1, 3, 8, 64]),
)


@settings(max_examples=60, deadline=None)
@given(d=SHAPES, apart=st.booleans())
def test_gated_delta(d: Drawn, apart: bool) -> None:
    decays = d.each if apart else d.g
    ours = OURS_GATED_DELTA(d.q, d.k, d.v, decays, d.beta, d.state)
    theirs = GATED_DELTA.gated_delta_ops(d.q, d.k, d.v, decays, d.beta, d.state)
    assert close(ours[0], theirs[0])
    assert close(ours[1], theirs[1])


@settings(max_examples=40, deadline=None)
@given(d=SHAPES)
def test_state_spaces(d: Drawn) -> None:
    a_log, big_d, dt, dt_bias = d.ssm
    asked = (d.v, a_log, d.k, d.q, big_d, dt, dt_bias, d.state)
    ours, theirs = OURS_SSM(*asked), SSM.ssm_attn(*asked)
    assert close(ours[0], theirs[0])
    assert close(ours[1], theirs[1])


@settings(max_examples=40, deadline=None)
@given(d=SHAPES, apart=st.booleans())
def test_gated_delta_of_some_tokens(d: Drawn, apart: bool) -> None:
    _, mask = d.kept()
    decays = d.each if apart else d.g
    ours = OURS_GATED_DELTA(d.q, d.k, d.v, decays, d.beta, d.state, mask)
    theirs = GATED_DELTA.gated_delta_ops(d.q, d.k, d.v, decays, d.beta, d.state, mask)
    assert close(ours[0], mx.where(mask[..., None, None], theirs[0], 0))
    assert close(ours[1], theirs[1])


@settings(max_examples=40, deadline=None)
@given(d=SHAPES, limit=st.sampled_from([(0.001, 100.0), (0.1, 0.5)]))
def test_state_spaces_of_some_tokens(d: Drawn, limit: tuple[float, float]) -> None:
    counts, mask = d.kept()
    a_log, big_d, dt, dt_bias = d.ssm
    asked = (d.v, a_log, d.k, d.q, big_d, dt, dt_bias, d.state, limit, mask, mx.array(counts))
    ours, theirs = OURS_SSM(*asked), SSM.ssm_attn(*asked)
    seen = mask[..., None, None]
    assert close(mx.where(seen, ours[0], 0), mx.where(seen, theirs[0], 0))
    assert close(ours[1], theirs[1])


def test_half_precision_around_states() -> None:
    """What goes in may be rounded; types are those of mlx-lm's functions."""
    d = Drawn(5, 2, 3, 2, 2, 16, 8)
    a_log, big_d, dt, dt_bias = d.ssm
    q, k, v, small_dt = (array.astype(mx.bfloat16) for array in (d.q, d.k, d.v, dt))
    pairs = [
        (OURS_GATED_DELTA, GATED_DELTA.gated_delta_ops, (q, k, v, d.g, d.beta, d.state)),
        (OURS_SSM, SSM.ssm_attn, (v, a_log, k, q, big_d, small_dt, dt_bias, d.state)),
    ]
    for our_function, their_function, asked in pairs:
        ours, theirs = our_function(*asked), their_function(*asked)
        assert [one.dtype for one in ours] == [one.dtype for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert mx.allclose(one.astype(mx.float32), other.astype(mx.float32), rtol=2e-2, atol=2e-2)


@settings(max_examples=40, deadline=None)
@given(d=SHAPES, apart=st.booleans(), corrects=st.booleans(), seed=st.integers(0, 99))
def test_rows_cuts_and_masks_change_no_bit(d: Drawn, apart: bool, corrects: bool, seed: int) -> None:
    """A row alone, its tokens one by one, and those that count of more: the same states and readings."""
    rng = np.random.default_rng(seed)
    counts, mask = d.kept()
    asked = Given(d.q, d.k, d.v, d.each if apart else d.g, d.beta if corrects else None)
    whole_read, whole = recurrent(d.state, asked)
    masked_read, masked = recurrent(
        d.state, Given(*asked.arrays(0, d.length)[:4], asked.shares, mask.astype(mx.float32))
    )
    row = int(rng.integers(d.n))
    state, read = d.state[row : row + 1], []
    states = [state]
    for first in range(d.length):
        parts = [array[row : row + 1, first : first + 1] for array in asked.arrays(0, d.length)]
        one, state = recurrent(state, Given(*parts))
        read.append(one)
        states.append(state)
    assert mx.array_equal(mx.concatenate(read, axis=1), whole_read[row : row + 1])
    assert mx.array_equal(state, whole[row : row + 1])
    count = counts[row]
    assert mx.array_equal(states[count], masked[row : row + 1])
    assert mx.array_equal(masked_read[row, :count], whole_read[row, :count])
    assert not mx.any(masked_read[row, count:])


def test_what_is_given_stays_as_it_is() -> None:
    """C writes over its own copy of the values, even where whoever gave them looks at them afterwards."""
    d = Drawn(1, 2, 3, 1, 2, 16, 8)
    flat = mx.contiguous(d.v.reshape(-1))
    before = np.array(flat)
    read, state = recurrent(d.state, Given(d.q, d.k, flat.reshape(d.v.shape), d.g, d.beta))
    again, _ = recurrent(d.state, Given(d.q, d.k, flat.reshape(d.v.shape), d.g, d.beta))
    mx.eval(state)
    mx.eval(read, again)
    assert np.array_equal(before, np.array(flat))
    assert mx.array_equal(read, again)


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(spoiled: float) -> None:
    d = Drawn(2, 3, 2, 2, 1, 16, 8)
    clean, _ = recurrent(d.state, Given(d.q, d.k, d.v, d.g, d.beta))
    bad = np.array(d.state)
    bad[1, 0, 0, 0] = spoiled
    read, state = recurrent(mx.array(bad), Given(d.q, d.k, d.v, d.g, d.beta))
    assert not np.isfinite(np.array(read)[1, 0, 0, 0])
    assert not np.isfinite(np.array(state)[1, 0, 0]).all()
    for row in (0, 2):
        assert mx.array_equal(read[row], clean[row])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: {"state": d.state.astype(mx.float16)},
        lambda d: {"k": mx.concatenate([d.k] * 3, axis=2), "q": mx.concatenate([d.q] * 3, axis=2)},
        lambda d: {"k": mx.concatenate([d.k] * 2, axis=3)},
        lambda d: {"v": mx.concatenate([d.v] * 2, axis=3)},
        lambda d: {"g": d.each[..., :1]},
        lambda d: {"beta": d.beta[:1]},
        lambda d: {"mask": mx.array([[True, True]])},
    ],
)
def test_what_does_not_fit_is_not_ours(spoil: Callable[[Drawn], dict[str, mx.array]]) -> None:
    """C would read beyond the end of what is given, or divide by nothing."""
    d = Drawn(3, 2, 2, 1, 2, 16, 8)
    called: list[str] = []

    def theirs(*_: object) -> tuple[mx.array, mx.array]:
        called.append("")
        return mx.zeros((1,)), mx.zeros((1,))

    module = ModuleType("theirs")
    vars(module).update(gated_delta_ops=theirs)
    asked = {"q": d.q, "k": d.k, "v": d.v, "g": d.g, "beta": d.beta, "state": d.state, **spoil(d)}
    recurrences.gated_delta(module)(**asked)
    assert called
    given = Given(*(asked[name] for name in ("q", "k", "v", "g", "beta")), counted=asked.get("mask"))
    with pytest.raises(ValueError, match="do not fit"):
        recurrent(asked["state"], given)


@pytest.mark.parametrize("ask", ["half precision", "lengths alone"])
def test_what_is_not_ours_is_theirs(ask: str) -> None:
    called: list[str] = []

    def theirs(*args: object) -> tuple[mx.array, mx.array]:
        called.append(ask)
        return mx.zeros((1,)), mx.zeros((1,))

    d = Drawn(3, 1, 2, 1, 1, 16, 8)
    a_log, big_d, dt, dt_bias = d.ssm
    module = ModuleType("theirs")
    vars(module).update(gated_delta_ops=theirs, ssm_attn=theirs, compute_dt=SSM.compute_dt)
    wrapped = recurrences.state_space(module)
    if ask == "half precision":
        half = d.state.astype(mx.float16)
        recurrences.gated_delta(module)(d.q, d.k, d.v, d.g, d.beta, half)
        wrapped(d.v, a_log, d.k, d.q, big_d, dt, dt_bias, half)
    else:
        wrapped(d.v, a_log, d.k, d.q, big_d, dt, dt_bias, d.state, lengths=mx.array([1]))
    assert len(called) == (2 if ask == "half precision" else 1)


def test_models_compute_with_them() -> None:
    from mlx_lm.models import gated_delta, ssm

    recurrences.install()
    recurrences.install()  # twice is once
    for function, untouched_function in (
        (gated_delta.gated_delta_ops, GATED_DELTA.gated_delta_ops),
        (ssm.ssm_attn, SSM.ssm_attn),
    ):
        assert function.__wrapped__.__code__.co_code == untouched_function.__code__.co_code


def test_a_product_that_is_computed_differently_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then mlx-lm's formulas are used."""
    assert recurrence.available()
    recurrence.available.cache_clear()
    monkeypatch.setattr(mx, "depends", lambda arrays, _: [mx.array(array) for array in arrays])
    assert not recurrence.available()
    recurrence.available.cache_clear()
