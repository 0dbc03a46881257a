from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from sampler_support import sampler

from millpond.types import SamplingParams


def log_softmax(row: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = row.astype(np.float64)
    norm = float(wide.max() + np.log(np.exp(wide - wide.max()).sum()))
    return wide - norm


@pytest.mark.parametrize("vocab_size", [100, 1500, 49152])
@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_like_numpy(vocab_size: int, k: int) -> None:
    logits = (np.random.default_rng(k).standard_normal((3, vocab_size)) * 4).astype(np.float32)
    # Sampling changes must not show in the log-probabilities.
    params = SamplingParams(max_tokens=1, temperature=0.5, top_p=0.9, logit_bias={7: 3.0}, logprobs=k, seed=5)
    picks = sampler([params] * 3, vocab_size)(mx.array(logits), [1, 2, 3])
    for row, token in enumerate(np.array(picks.tokens)):
        exact = log_softmax(logits[row])
        got = picks.logprobs_of(row, k)
        assert got.token == token
        assert got.logprob == pytest.approx(exact[token], abs=2e-5)
        best = np.argsort(-exact, kind="stable")[:k]
        assert [t for t, _ in got.top] == best.tolist()
        np.testing.assert_allclose([v for _, v in got.top], exact[best], atol=2e-5)


def test_equal_tokens_come_by_id() -> None:
    logits = np.zeros((1, 3000), dtype=np.float32)
    logits[0, [5, 900, 2999]] = 1.0
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=6)
    top = sampler([params], 3000)(mx.array(logits), [0]).logprobs_of(0, 6).top
    assert [t for t, _ in top] == [5, 900, 2999, 0, 1, 2]


def test_only_asked_rows_have_them() -> None:
    logits = mx.array(np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32))
    asks = [None, 2, 4]
    batch = [SamplingParams(max_tokens=1, temperature=0.0, logprobs=k) for k in asks]
    picks = sampler(batch, 500)(logits, [0] * 3)
    assert picks.logprobs is not None
    assert picks.logprobs.top_ids.shape == (3, 4)
    assert np.isnan(np.array(picks.logprobs.chosen)).tolist() == [True, False, False]
    assert picks.logprobs.top_ids[0].tolist() == [-1] * 4
    assert len(picks.logprobs_of(1, 2).top) == 2
    assert len(picks.arrays()) == 5


def test_none_when_nobody_asks() -> None:
    picks = sampler([SamplingParams(max_tokens=1)], 500)(mx.zeros((1, 500)), [0])
    assert picks.logprobs is None
    assert len(picks.arrays()) == 2
    with pytest.raises(ValueError, match="row 0"):
        picks.logprobs_of(0, 0)


def test_masked_and_short_float_logits() -> None:
    logits = np.random.default_rng(1).standard_normal((1, 300)).astype(np.float16)
    logits[0, 50:] = -np.inf
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20)
    got = sampler([params], 300)(mx.array(logits), [0]).logprobs_of(0, 20)
    exact = log_softmax(logits[0].astype(np.float32))
    np.testing.assert_allclose([v for _, v in got.top], exact[[t for t, _ in got.top]], atol=2e-5)
