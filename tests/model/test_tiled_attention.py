"""Attention in C against MLX's own, across the borders of its tiles."""

from __future__ import annotations

import pytest

from millpond.model import blas

if not blas.needed() or not blas.shim_path().is_file():
    pytest.skip("only where MLX computes on a Linux CPU and the C part is built", allow_module_level=True)

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.model.cpu_math import LOG2_E, attention
from millpond.model.tiled_attention import TILED_QUERIES, tiled, tiled_attention
from millpond.model.upstream import Mask, upstream_attention


def drawn(seed: int, n: int, heads: int, groups: int, length: int, width: int, dims: int = 16) -> list[mx.array]:
    """Queries, keys and values as models pass them: views with gaps between heads."""
    mx.random.seed(seed)
    queries = mx.random.normal((n, length, heads, dims)).transpose(0, 2, 1, 3) * 3
    return [queries, *(mx.random.normal((n + 1, groups, width + 7, size))[:n, :, :width] for size in (dims, 24))]


def seen(kind: str, n: int, heads: int, length: int, width: int) -> Mask:
    if kind in ("none", "causal"):
        return None if kind == "none" else kind
    shape = {"plain": (length, width), "rows": (n, 1, length, width), "heads": (n, heads, length, width)}[kind]
    return (mx.random.uniform(shape=shape) > 0.4).at[..., 0].add(True)


@pytest.fixture(autouse=True, scope="module")
def prepared() -> None:
    assert tiled(None), "it has to be what is tested"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9),
    n=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    sharing=st.sampled_from([1, 2, 3]),
    length=st.sampled_from([16, 17, 127, 128, 129, 300]),
    before=st.sampled_from([0, 1, 100, 255, 256, 257, 513]),
    kind=st.sampled_from(["none", "causal", "plain", "rows", "heads"]),
)
def test_it_equals_mlx(seed: int, n: int, groups: int, sharing: int, length: int, before: int, kind: str) -> None:
    heads, width = groups * sharing, before + length
    queries, keys, values = drawn(seed, n, heads, groups, length, width)
    mask = seen(kind, n, heads, length, width)
    ours = attention(queries, keys, values, None, 0.25, mask)
    assert ours.shape == (n, heads, length, 24)
    assert mx.allclose(ours, upstream_attention(queries, keys, values, None, 0.25, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dims", [64, 72])
@pytest.mark.parametrize("cut", [1, 64, 129, 320, 447])
def test_a_row_has_the_same_bits_in_another_chunk(cut: int, dims: int) -> None:
    """A prompt whose beginning is cached is computed in other chunks than one computed afresh (D4, E8)."""
    queries, keys, values = drawn(1, 1, 6, 2, 448, 448, dims=dims)
    whole = tiled_attention(queries, keys, values, 0.3, "causal")
    rest = tiled_attention(queries[:, :, cut:], keys, values, 0.3, "causal")
    begin = tiled_attention(queries[:, :, :cut], keys[:, :, :cut], values[:, :, :cut], 0.3, "causal")
    assert mx.array_equal(whole[:, :, cut:], rest)
    assert mx.array_equal(whole[:, :, :cut], begin)


def test_a_head_has_the_same_bits_beside_others() -> None:
    """Ranks of a group have some of the heads each."""
    queries, keys, values = drawn(5, 2, 6, 2, 100, 150, dims=64)
    whole = tiled_attention(queries, keys, values, 0.3, "causal")
    assert mx.array_equal(tiled_attention(queries[:, 3:], keys[:, 1:], values[:, 1:], 0.3, "causal"), whole[:, 3:])
    assert mx.array_equal(tiled_attention(queries[:, 4:5], keys[:, 1:], values[:, 1:], 0.3, "causal"), whole[:, 4:5])


def test_extreme_scores_stay_finite() -> None:
    """The largest comes last, in a tile of its own: what was summed up before vanishes against it."""
    queries = mx.ones((1, 1, 16, 4))
    keys = mx.concatenate([mx.full((1, 1, 300, 4), -1e30), mx.zeros((1, 1, 1, 4)), mx.full((1, 1, 1, 4), 1e30)], axis=2)
    values = mx.arange(302, dtype=mx.float32)[None, None, :, None]
    assert mx.array_equal(tiled_attention(queries, keys, values, 1.0, None), mx.full((1, 1, 16, 1), 301.0))


@pytest.mark.parametrize("where", [0, 270])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_a_number_is_not_hidden(where: int, bad: float) -> None:
    """A sick key has to reach the logits, where the engine looks for it."""
    queries, keys, values = drawn(2, 1, 2, 1, 20, 300)
    keys = keys.at[0, 0, where, 0].add(bad)
    sick = mx.isfinite(tiled_attention(queries, keys, values, 1.0, None))
    assert not sick.all()
    assert mx.array_equal(sick, mx.isfinite(upstream_attention(queries, keys, values, None, 1.0, None)))


def test_a_mask_that_is_added_and_short_queries_go_the_other_way() -> None:
    assert not tiled(mx.zeros((4, 4)))
    queries, keys, values = drawn(3, 2, 2, 2, TILED_QUERIES - 1, 40)
    ours = attention(queries, keys, values, None, 1.0, "causal")
    assert mx.allclose(ours, tiled_attention(queries, keys, values, LOG2_E, "causal"), rtol=1e-5, atol=1e-5)


def test_other_types_go_the_other_way() -> None:
    """Keys in half precision beside float32 queries: C would read them as something else."""
    queries, keys, values = drawn(4, 1, 2, 1, 20, 40)
    half = keys.astype(mx.float16)
    assert not tiled(None, queries, half, values)
    ours = attention(queries, half, values, None, 0.3, None)
    assert mx.allclose(ours, upstream_attention(queries, half.astype(mx.float32), values, None, 0.3, None), atol=1e-4)
