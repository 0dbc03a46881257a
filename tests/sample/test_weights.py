"""The integer arithmetic of draws and cuts against Python integers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.sample.noise import bits, words
from millpond.sample.weights import SortKeys, draw, fraction_words, min_weight, padded, scaled, weigh

SCALE = 2**40


def some_weights(seed: int, rows: int, width: int, spread: float) -> npt.NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, width)) * spread
    logits[rng.random((rows, width)) < 0.2] = -100.0
    weights: npt.NDArray[np.int64] = np.floor(np.exp(logits - logits.max(axis=1, keepdims=True)) * SCALE).astype(
        np.int64
    )
    return weights


def ranked(row: npt.NDArray[np.int64]) -> list[int]:
    """Token ids, likeliest first, equal ones by id."""
    return sorted(range(len(row)), key=lambda t: (-int(row[t]), t))


def nucleus(row: npt.NDArray[np.int64], order: list[int], fraction: float) -> set[int]:
    total, upto, kept = sum(int(row[t]) for t in order), 0, set()
    high, low = fraction_words(fraction)
    need = max(1, total * ((high << 31) + low) >> 62)
    for token in order:
        if upto >= need:
            break
        kept.add(token)
        upto += int(row[token])
    return kept


def kept_by(keys: mx.array, cut: mx.array, row: int) -> set[int]:
    return set(np.flatnonzero(np.array(keys >= cut)[row]).tolist())


@given(st.integers(1, 2**62 - 1), st.integers(0, 2**62 - 1))
@settings(deadline=None)
def test_scaled(total: int, fraction: int) -> None:
    share = mx.array(np.array([[fraction >> 31, fraction & (2**31 - 1)]], dtype=np.int64))
    got = int(np.array(scaled(mx.array(np.array([[total]], dtype=np.int64)), share))[0, 0])
    exact = total * fraction >> 62
    assert exact - 2 <= got <= exact
    assert got < total


@pytest.mark.parametrize("width", [128, 384, 49152])
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_draw_is_the_inverse_cdf(width: int, spread: float) -> None:
    rows = 40
    weights = some_weights(1, rows, width, spread)
    seeds, positions = [9] * rows, list(range(rows))
    got = np.array(draw(mx.array(weights), mx.array(words(seeds, positions)))).tolist()
    for row in range(rows):
        upto = np.cumsum(weights[row])
        target = int(upto[-1]) * (bits(9, row) >> 2) >> 62
        exact = [int(np.searchsorted(upto, target - slack, side="right")) for slack in (0, 1, 2)]
        assert got[row] in exact
        assert weights[row, got[row]] > 0


def test_draw_at_both_ends() -> None:
    weights = np.zeros((2, 256), dtype=np.int64)
    weights[:, 3], weights[:, 200] = 5, SCALE
    top = 2**31 - 1
    assert draw(mx.array(weights), mx.array([[0, 0], [top, top]], dtype=mx.int64)).tolist() == [3, 200]


@pytest.mark.parametrize("sort_width", [1, 100, 10**6])
@pytest.mark.parametrize("width", [128, 1280, 4096])
@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0])
def test_nucleus_cut(width: int, spread: float, sort_width: int) -> None:
    fractions = [0.0, 0.1, 0.5, 0.9, 0.95, 0.999]
    weights = some_weights(2, len(fractions), width, spread)
    keys = SortKeys(width)
    packed = keys.pack(mx.array(weights))
    share = mx.array(np.array([fraction_words(f) for f in fractions], dtype=np.int64))
    cut = keys.nucleus_cut(packed, share, sort_width)
    for row, fraction in enumerate(fractions):
        assert kept_by(packed, cut, row) == nucleus(weights[row], ranked(weights[row]), fraction)


@pytest.mark.parametrize("width", [128, 1280, 16384])
@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0])
def test_ranked_cut(width: int, spread: float) -> None:
    asked = [(1, 1.0), (2, 0.9), (20, 1.0), (20, 0.5), (100, 0.95), (7, 0.0)]
    weights = some_weights(3, len(asked), width, spread)
    keys = SortKeys(width)
    packed = keys.pack(mx.array(weights))
    share = mx.array(np.array([fraction_words(f) for _, f in asked], dtype=np.int64))
    cut = keys.ranked_cut(keys.largest(packed, 100), mx.array([[k] for k, _ in asked]), share)
    for row, (k, fraction) in enumerate(asked):
        kept = kept_by(packed, cut, row)
        positive = {t for t in kept if weights[row, t] > 0}
        assert positive == {t for t in nucleus(weights[row], ranked(weights[row])[:k], fraction) if weights[row, t] > 0}
        assert len(kept) <= k


@pytest.mark.parametrize("count", [1, 5, 50, 128, 1280])
def test_largest(count: int) -> None:
    weights = some_weights(4, 3, 1280, 0.5)
    weights[:, ::3] = weights[:, :1]
    keys = SortKeys(1280)
    best = np.array(keys.ids(keys.largest(keys.pack(mx.array(weights)), count)))[:, ::-1]
    for row in range(3):
        assert best[row].tolist() == ranked(weights[row])[:count]


@pytest.mark.parametrize("vocab_size", [1000, 49152, 262144])
def test_weights_are_exact_enough(vocab_size: int) -> None:
    logits = (np.random.default_rng(5).standard_normal((2, vocab_size)) * 3).astype(np.float32)
    given = mx.array(logits)
    inverse = mx.array([[np.log2(np.e) / 0.7], [np.log2(np.e) / 2.0]], dtype=mx.float32)
    weights = np.array(weigh(given, mx.max(given, axis=-1, keepdims=True), inverse))
    assert weights.shape == (2, padded(vocab_size))
    assert weights.max(axis=1).tolist() == [SCALE, SCALE]
    assert (weights[:, vocab_size:] == 0).all()
    for row, temperature in enumerate((0.7, 2.0)):
        exact = np.exp((logits[row].astype(np.float64) - logits[row].max()) / temperature)
        exact /= exact.sum()
        share = weights[row, :vocab_size] / weights[row].sum(dtype=np.float64)
        assert np.abs(share - exact).sum() / 2 < 2e-6


def test_equal_weights_of_a_large_vocabulary_have_no_drift() -> None:
    vocab_size = 262144
    flat = mx.zeros((1, vocab_size))
    weights = weigh(flat, mx.zeros((1, 1)), mx.ones((1, 1)))
    for step in range(64):
        noise = mx.array(np.array([[step << 25, 1]], dtype=np.int64))
        assert int(np.array(draw(weights, noise))[0]) == step * vocab_size // 64


def test_min_weight_never_shuts_out_the_likeliest() -> None:
    assert min_weight(0.0) == 0
    assert min_weight(0.25) == SCALE // 4
    assert min_weight(1.0) < SCALE


@pytest.mark.parametrize("vocab_size", [0, 2**22 + 1])
def test_vocabulary_limits(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=str(vocab_size)):
        SortKeys(vocab_size)
