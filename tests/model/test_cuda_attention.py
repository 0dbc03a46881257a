"""Attention as it is computed on an NVIDIA GPU, against float64; the arithmetic runs anywhere."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.model import cuda_attention
from millpond.model.cuda_attention import FEW_QUERIES, STEP, attention, plain_attention, rounded_attention

DIM, VALUE_DIM, SCALE = 16, 8, 0.3
Floats = npt.NDArray[np.float32]


def drawn(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sides(n: int, heads: int, groups: int, length: int, width: int) -> tuple[Floats, Floats, Floats]:
    """Queries, keys and values."""
    return drawn(1, n, heads, length, DIM), drawn(2, n, groups, width, DIM), drawn(3, n, groups, width, VALUE_DIM)


def expected(queries: Floats, keys: Floats, values: Floats, seen: npt.NDArray[np.bool_] | None) -> Floats:
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(side.astype(np.float64), repeats, axis=1) for side in (keys, values))
    scores = SCALE * queries @ keys.swapaxes(-1, -2)
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def causal(length: int, width: int) -> npt.NDArray[np.bool_]:
    return np.arange(width - length, width)[:, None] >= np.arange(width)


def close(ours: mx.array, reference: Floats) -> bool:
    return ours.shape == reference.shape and bool(np.abs(np.array(ours) - reference).max() < 1e-5)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("shape", ["one for all heads", "for all rows"])
@pytest.mark.parametrize("added", [False, True])
def test_rows_of_different_lengths(heads: int, groups: int, length: int, shape: str, added: bool) -> None:
    queries, keys, values = sides(3, heads, groups, length, 40)
    ends = np.array([40, 7, 23])[:, None, None, None]
    seen = np.arange(40) < ends - length + 1 + np.arange(length)[:, None]
    if shape == "for all rows":
        seen = seen[1, 0]
    mask = mx.array(np.where(seen, 0.0, -1e9).astype(np.float32)) if added else mx.array(seen)
    result = attention(*map(mx.array, (queries, keys, values)), None, SCALE, mask)
    assert close(result, expected(queries, keys, values, seen))


@settings(max_examples=40)
@given(
    length=st.integers(1, 300),
    before=st.integers(0, 600),
    shared=st.sampled_from([(1, 2, 1), (2, 2, 2), (1, 6, 2)]),
)
def test_a_chunk_of_a_prompt(length: int, before: int, shared: tuple[int, int, int]) -> None:
    """Few scores or many: behind whatever is there already, each token sees what came before it."""
    queries, keys, values = sides(*shared, length, before + length)
    reference = expected(queries, keys, values, causal(length, before + length))
    arrays = tuple(map(mx.array, (queries, keys, values)))
    assert close(plain_attention(*arrays, SCALE, "causal"), reference)
    assert close(rounded_attention(*arrays, SCALE), reference)
    assert close(attention(*arrays, None, SCALE, "causal"), reference)


def test_the_fused_kernel_is_made_for_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any prompts up to 16k tokens, read from any place on in chunks of any size; and rounding adds little."""
    shapes: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    def kernel(queries: mx.array, keys: mx.array, values: mx.array, **named: object) -> mx.array:
        assert named["mask"] == "causal"
        assert queries.shape[2] <= keys.shape[2] == values.shape[2], "what cuDNN refuses"
        shapes.add((queries.shape, keys.shape))
        return queries

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", kernel)
    many = 0
    for length, width in product((300, 511, 512, 777, 1024, 2000, 2048), range(2048, 16384, 61)):
        queries, keys = mx.zeros((1, 1, length, 8)), mx.zeros((1, 1, width, 8))
        assert rounded_attention(queries, keys, keys, 1.0).shape == queries.shape
        many += 1
    assert len(shapes) < many / 5
    for queries, keys in shapes:
        assert queries[2] % STEP == keys[2] % STEP == 0
    largest = max(keys[2] for _, keys in shapes)
    assert largest <= 16384 * 17 / 16


def test_a_kernel_of_any_shape_where_shapes_change_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps, drafts and short prompts never wait for one to be made; nor does a long prompt have its scores in
    memory."""
    made: list[tuple[int, ...]] = []
    kernel = mx.fast.scaled_dot_product_attention

    def counting(queries: mx.array, *rest: object, **named: object) -> mx.array:
        made.append(queries.shape)
        return kernel(queries, *rest, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counting)
    monkeypatch.setattr(cuda_attention, "PLAIN_SCORES", 2 * 100 * 400)

    def attend(length: int, width: int, mask: mx.array | str | None, n: int = 1) -> None:
        keys = mx.zeros((n, 2, width, 16), dtype=mx.bfloat16)
        mx.eval(attention(mx.zeros((n, 2, length, 16), dtype=mx.bfloat16), keys, keys, None, 1.0, mask))

    for n, width, length in product((1, 4, 7), (50, 401, 1000), (1, 2, FEW_QUERIES - 1)):
        attend(length, width, mx.ones((n, 1, length, width), dtype=mx.bool_), n)
    attend(100, 400, "causal")
    assert made == []
    attend(1, 1000, None)
    attend(101, 400, "causal")
    assert made == [(1, 2, 1, 16), (1, 2, 256, 16)]


@pytest.mark.parametrize("why", ["sinks", "a mask for each head", "a head that has no kernel"])
def test_what_is_left_to_mlx_lm(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "PLAIN_SCORES", 0)
    dim = 256 if why == "a head that has no kernel" else 16
    queries, keys = mx.array(drawn(1, 1, 2, 3, dim)), mx.array(drawn(2, 1, 2, 9, dim))
    sinks = mx.array([0.5, -0.5]) if why == "sinks" else None
    mask = mx.array(drawn(4, 1, 2, 3, 9)) if why == "a mask for each head" else "causal"
    ours = attention(queries, keys, keys, None, SCALE, mask, sinks)
    reference = mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=SCALE, mask=mask, sinks=sinks)
    assert mx.array_equal(ours, reference)
