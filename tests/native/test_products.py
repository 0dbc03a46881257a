"""Products with weights as they are on disk beside double precision: every format, odd sizes, rows, threads (R4)."""

from __future__ import annotations

import pytest

from millpond.native.library import prepared

if prepared() is None:
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.model import packed_linear
from millpond.model.upstream import QuantizedSwitchLinear
from millpond.native import products
from millpond.native.products import Matrix, StandIn

Doubles = npt.NDArray[np.float64]
AFFINE = [(bits, group, "affine") for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
POWERS = [(4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8")]
PLAIN = [(16, 32, "float16"), (16, 32, "bfloat16")]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
ROUNDING = 2e-6
"""Of the sum of the sizes of what is added, what an error may be."""
UNIT = 1 / 32512
"""Of the largest number of a vector's group, what another may be rounded to where weights are multiplied as whole
numbers."""


@dataclass(frozen=True)
class Case:
    """Weights of one layer."""

    bits: int
    group: int
    mode: str
    outputs: int
    groups: int
    """Of each output."""
    factors: str = "float16"
    seed: int = 0
    experts: int = 0

    @property
    def inputs(self) -> int:
        return self.group * self.groups

    @cached_property
    def drawn(self) -> mx.array:
        rng = np.random.default_rng(self.seed)
        shape = (*([self.experts] if self.experts else []), self.outputs, self.inputs)
        sizes = np.exp(rng.standard_normal((*shape[:-1], 1)))
        return mx.array((rng.standard_normal(shape) * sizes).astype(np.float32))

    @cached_property
    def stored(self) -> list[mx.array]:
        if self.mode in DTYPES:
            return [self.drawn.astype(DTYPES[self.mode])]
        if self.mode == "affine":
            return list(mx.quantize(self.drawn.astype(DTYPES[self.factors]), group_size=self.group, bits=self.bits))
        return list(mx.quantize(self.drawn, group_size=self.group, bits=self.bits, mode=self.mode))

    @cached_property
    def stand_in(self) -> StandIn:
        weight, *rest = self.stored
        scales, biases = (*rest, None, None)[:2]
        return products.stand_in(Matrix(weight, scales, biases, self.group, self.bits, self.mode))

    @cached_property
    def weights(self) -> Doubles:
        weight, *rest = self.stored
        if not rest:
            return np.array(weight.astype(mx.float32)).astype(np.float64)
        if self.mode == "affine":
            rest = [array.astype(mx.float32) for array in rest]
        wide = mx.dequantize(weight, *rest, group_size=self.group, bits=self.bits, mode=self.mode, dtype=mx.float32)
        return np.array(wide).astype(np.float64)

    @property
    def whole(self) -> bool:
        return self.mode not in DTYPES and self.mode != "mxfp8"

    def vectors(self, rows: int) -> mx.array:
        """Some numbers of them are much larger than the others."""
        rng = np.random.default_rng(self.seed + rows)
        x = rng.standard_normal((rows, self.inputs)) * np.where(rng.random((rows, self.inputs)) < 0.02, 100, 1)
        return mx.array(x.astype(np.float32))

    def bound(self, x: Doubles, weights: Doubles) -> Doubles:
        """Most that a product may be off, [rows, outputs]."""
        sizes = np.abs(x) @ np.abs(weights).T * ROUNDING
        if not self.whole:
            return sizes
        largest = np.repeat(np.abs(x).reshape(len(x), self.groups, self.group).max(axis=-1), self.group, axis=1)
        # With numbers as they are stored a bias is added to all of them, which may be larger than what they are then.
        steps = np.abs(weights) + np.abs(weights).max()
        return sizes + 0.5 * UNIT * largest @ steps.T


FORMATS = [*AFFINE, *POWERS, *PLAIN]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form[2]}-{form[0]}-{form[1]}")
@settings(max_examples=12, deadline=None)
@given(
    outputs=st.sampled_from([2, 15, 16, 17, 33, 160]),
    groups=st.integers(1, 9),
    factors=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 1000),
    rows=st.sampled_from([1, 2, 3, 5, 8, 9, 17, 33]),
)
def test_products(form: tuple[int, int, str], outputs: int, groups: int, factors: str, seed: int, rows: int) -> None:
    """And a row alone has the same bits."""
    groups *= 32 // min(32, form[1])  # there are always a multiple of 32 inputs
    case = Case(*form, outputs=outputs, groups=groups, factors=factors, seed=seed)
    x = case.vectors(rows)
    found = products.product(case.stand_in, x)
    exact = np.array(x).astype(np.float64)
    error = np.abs(np.array(found) - exact @ case.weights.T)
    assert (error <= case.bound(exact, case.weights)).all(), (error / case.bound(exact, case.weights)).max()
    row = seed % rows
    assert mx.array_equal(products.product(case.stand_in, x[row : row + 1]), found[row : row + 1])


@pytest.mark.parametrize("form", [(4, 64, "affine"), (3, 32, "affine"), (8, 64, "affine"), *POWERS, *PLAIN])
@settings(max_examples=12, deadline=None)
@given(
    experts=st.integers(1, 5),
    vectors=st.sampled_from([1, 3, 20]),
    each=st.integers(1, 3),
    outputs=st.sampled_from([8, 24, 33]),
    seed=st.integers(0, 1000),
)
def test_experts(form: tuple[int, int, str], experts: int, vectors: int, each: int, outputs: int, seed: int) -> None:
    case = Case(*form, outputs=outputs, groups=4, seed=seed, experts=experts)
    x, rng = case.vectors(vectors), np.random.default_rng(seed)
    chosen = rng.integers(0, experts, (vectors, each)).astype(np.uint32)
    found = np.array(products.gathered(case.stand_in, x, mx.array(chosen).reshape(-1)))
    exact = np.repeat(np.array(x).astype(np.float64), each, axis=0)
    for row, expert in enumerate(chosen.ravel()):
        weights, one = case.weights[expert], exact[row : row + 1]
        assert (np.abs(found[row] - (one @ weights.T)[0]) <= case.bound(one, weights)[0]).all()


@pytest.mark.parametrize("form", [(4, 64, "affine"), (8, 32, "mxfp8"), (16, 32, "bfloat16")])
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(form: tuple[int, int, str], spoiled: float) -> None:
    case = Case(*form, outputs=40, groups=5)
    x = np.array(case.vectors(9))
    clean = products.product(case.stand_in, mx.array(x))
    x[4, 70] = spoiled
    found = products.product(case.stand_in, mx.array(x))
    assert not np.isfinite(np.array(found)[4]).any()
    others = [row for row in range(9) if row != 4]
    assert mx.array_equal(found[mx.array(others)], clean[mx.array(others)])


@pytest.mark.parametrize("form", [(4, 64, "affine"), (4, 32, "mxfp4"), (16, 32, "float16")])
def test_numbers_at_the_ends_of_their_range(form: tuple[int, int, str]) -> None:
    """Zeros, the smallest numbers, which are nothing beside any weight, and large ones."""
    case = Case(*form, outputs=32, groups=4)
    for scale in (0.0, 1e-44, 1e-38, 1e-30, 1e30):
        x = np.array(case.vectors(3)) * np.float32(scale)
        found = np.array(products.product(case.stand_in, mx.array(x)))
        exact = x.astype(np.float64)
        assert (np.abs(found - exact @ case.weights.T) <= case.bound(exact, case.weights) + 2e-29).all()


def test_large_products_are_shared() -> None:
    """Among threads, in pieces: the same bits."""
    case = Case(4, 64, "affine", outputs=4096, groups=16)
    x = case.vectors(40)
    found = products.product(case.stand_in, x)
    for row in (0, 7, 39):
        assert mx.array_equal(products.product(case.stand_in, x[row : row + 1]), found[row : row + 1])
    exact = np.array(x).astype(np.float64)
    assert (np.abs(np.array(found) - exact @ case.weights.T) <= case.bound(exact, case.weights)).all()


def test_weights_with_gaps_are_refused() -> None:
    weight, scales, biases = Case(4, 64, "affine", outputs=32, groups=4).stored
    with pytest.raises(ValueError, match="without gaps"):
        products.stand_in(Matrix(weight[:, ::2], scales[:, ::2], biases[:, ::2], 64, 4))
    with pytest.raises(ValueError, match="multiple of 32"):
        products.stand_in(Matrix(mx.zeros((8, 48), mx.float16)))


@pytest.mark.parametrize("outputs", [1001, 2002, 4096])
def test_what_stands_for_weights_is_small(outputs: int) -> None:
    """Odd numbers of outputs, as vocabularies have, too."""
    case = Case(4, 64, "affine", outputs=outputs, groups=8)
    assert case.stand_in.array.nbytes <= 65536
    x = case.vectors(3)
    error = np.abs(np.array(products.product(case.stand_in, x)) - np.array(x).astype(np.float64) @ case.weights.T)
    assert (error <= case.bound(np.array(x).astype(np.float64), case.weights)).all()


@pytest.mark.parametrize("outputs", [64, 1001])
def test_vectors_in_any_order_of_memory(outputs: int) -> None:
    case = Case(4, 64, "affine", outputs=outputs, groups=16)
    share = case.inputs // case.stand_in.array.shape[1]
    for rows in (share, 1024 // share, 32):
        x = case.vectors(rows)
        clean = products.product(case.stand_in, x)
        turned, spread = mx.contiguous(x.T).T, mx.concatenate([x, x], axis=1)[:, : case.inputs]
        assert mx.array_equal(products.product(case.stand_in, turned), clean)
        assert mx.array_equal(products.product(case.stand_in, spread), clean)
        swapped = mx.contiguous(mx.stack([x, x]).swapaxes(1, 2)).swapaxes(1, 2)
        assert mx.array_equal(products.product(case.stand_in, swapped)[1], clean)


@pytest.mark.parametrize("rows", [1, 3])
def test_experts_whose_numbers_are_the_same_for_all_rows(rows: int) -> None:
    """As layers of groups have them: vectors [rows, groups, 1, inputs], experts [1, groups]."""
    layer = QuantizedSwitchLinear(128, 48, 4, bias=False, group_size=64, bits=4)
    x, which = mx.random.normal((rows, 4, 1, 128)), mx.arange(4, dtype=mx.uint32)[None]
    theirs = layer(x, which)
    network = nn.Module()
    network.layer = layer
    packed_linear.install(network)
    ours = layer(x, which)
    assert ours.shape == theirs.shape
    assert mx.allclose(ours, theirs, atol=1e-3).item()
    assert mx.array_equal(layer(x[:1], which), ours[:1])
