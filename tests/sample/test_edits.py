"""Penalties and logit_bias against a plain per-token reference."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.sample.edits import LogitEdits
from kvarn.types import SamplingParams

VOCAB = 23


def naive(
    logits: npt.NDArray[np.float32], params: SamplingParams, prompt: list[int], answer: list[int]
) -> npt.NDArray[np.float64]:
    out = logits.astype(np.float64)
    for token in range(len(out)):
        if params.repetition_penalty != 1.0 and token in prompt + answer:
            out[token] = (
                out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
            )
        times = answer.count(token)
        if times:
            out[token] -= params.presence_penalty + params.frequency_penalty * times
        out[token] += params.logit_bias.get(token, 0.0)
    return out


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=30)
rows = st.tuples(
    st.builds(
        SamplingParams,
        max_tokens=st.just(1),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7, 2.0]),
        presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=5),
    ),
    tokens.filter(bool),
    tokens,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.data())
def test_like_the_reference(
    batch: list[tuple[SamplingParams, list[int], list[int]]], seed: int, data: st.DataObject
) -> None:
    logits = (np.random.default_rng(seed).standard_normal((len(batch), VOCAB)) * 5).astype(np.float32)
    params = [p for p, _, _ in batch]
    edits = LogitEdits(params, VOCAB)
    # The answers arrive in pieces of any length, as steps and verified drafts deliver them.
    stops = sorted(data.draw(st.lists(st.integers(0, 30), max_size=3)))
    for stop in [*stops, 30]:
        histories = [prompt + answer[:stop] if p.needs_history else None for p, prompt, answer in batch]
        edits.follow(histories, [len(prompt) for _, prompt, _ in batch])
    changed = np.array(edits.apply(mx.array(logits)))
    for row, (p, prompt, answer) in enumerate(batch):
        np.testing.assert_allclose(changed[row], naive(logits[row], p, prompt, answer), rtol=1e-5, atol=1e-4)


def test_rows_without_edits_keep_every_bit() -> None:
    logits = mx.array(np.random.default_rng(0).standard_normal((2, VOCAB)).astype(np.float32))
    biased = SamplingParams(max_tokens=1, logit_bias={3: -100.0, 7: 100.0})
    changed = LogitEdits([SamplingParams(max_tokens=1), biased], VOCAB).apply(logits)
    assert bool(mx.array_equal(changed[0], logits[0]))
    assert int(mx.argmax(changed[1])) == 7
    assert int(mx.argmin(changed[1])) == 3


def test_the_given_logits_are_left_alone() -> None:
    logits = mx.zeros((1, VOCAB))
    mx.eval(LogitEdits([SamplingParams(max_tokens=1, logit_bias={0: 5.0})], VOCAB).apply(logits))
    assert float(mx.max(mx.abs(logits))) == 0.0


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    params = SamplingParams(max_tokens=1, repetition_penalty=2.0, logit_bias={VOCAB: 5.0, -1: 5.0})
    edits = LogitEdits([params], VOCAB)
    edits.follow([[VOCAB, VOCAB + 100, -2]], [1])
    logits = mx.ones((1, VOCAB))
    assert bool(mx.array_equal(edits.apply(logits), logits))


def test_a_shorter_or_different_history_starts_afresh() -> None:
    edits = LogitEdits([SamplingParams(max_tokens=1, frequency_penalty=1.0)], VOCAB)
    for answer in ([5, 5, 6], [5], [4, 4]):
        edits.follow([[1, *answer]], [1])
        expected = [-float(answer.count(t)) for t in range(VOCAB)]
        assert edits.apply(mx.zeros((1, VOCAB))).tolist() == [expected]


def test_more_ids_than_the_first_table_holds() -> None:
    params = SamplingParams(max_tokens=1, repetition_penalty=2.0)
    edits = LogitEdits([params], 1000)
    edits.follow([list(range(0, 1000, 2))], [500])
    changed = np.array(edits.apply(mx.ones((1, 1000))))[0]
    assert (changed[::2] == 0.5).all()
    assert (changed[1::2] == 1.0).all()


def test_masked_tokens_stay_masked() -> None:
    edits = LogitEdits([SamplingParams(max_tokens=1, repetition_penalty=1.5, logit_bias={2: 100.0})], VOCAB)
    edits.follow([[2, 2]], [1])
    logits = mx.where(mx.arange(VOCAB) == 2, -mx.inf, 1.0)[None]
    assert float(edits.apply(logits)[0, 2]) == -np.inf


def test_a_missing_history_is_refused() -> None:
    edits = LogitEdits([SamplingParams(max_tokens=1, presence_penalty=1.0)], VOCAB)
    with pytest.raises(ValueError, match=r"histories\[0\]"):
        edits.follow([None], [1])
