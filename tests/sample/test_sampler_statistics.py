"""Draws over many positions and seeds follow the exact distribution, by chi-square with fixed seeds."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from sampler_support import sampler
from statistics_support import deviation

from millpond.types import SamplingParams

ROWS = 1000
VOCAB = 300
PROMPT = [1, 2, 3, 4]
ANSWER = [4, 5, 5, 6, 299]


def exact(logits: npt.NDArray[np.float64], params: SamplingParams) -> npt.NDArray[np.float64]:
    """The documented order of steps, one after the other, in float64."""
    x = logits.copy()
    for token in set(PROMPT + ANSWER):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(ANSWER):
        x[token] -= params.presence_penalty + params.frequency_penalty * ANSWER.count(token)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    p: npt.NDArray[np.float64] = np.exp((x - x.max()) / params.temperature)
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0.0
    before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
    if params.top_p < 1.0:
        p[order[before >= params.top_p * p.sum()]] = 0.0
    p[p < params.min_p * p.max()] = 0.0
    p /= p.sum()
    return p


CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 1e-3},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 1.0, "top_k": 12},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 80, "top_p": 0.95, "min_p": 0.03},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.7, "top_p": 0.97},
    {
        "temperature": 0.8,
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.5,
        "logit_bias": {9: 4.0, 5: -1.0},
        "top_k": 40,
    },
]


@pytest.mark.often("seed")
@pytest.mark.parametrize("by", ["position", "seed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_distribution(case: dict[str, Any], by: str) -> None:
    logits = (np.random.default_rng(11).standard_normal(VOCAB) * 2).astype(np.float32)
    p = exact(logits.astype(np.float64), SamplingParams(max_tokens=1, **case))
    given = mx.array(np.repeat(logits[None], ROWS, axis=0))
    counts = np.zeros(VOCAB, dtype=np.int64)
    calls = 20 if by == "position" else 10
    histories, prompts = [PROMPT + ANSWER] * ROWS, [len(PROMPT)] * ROWS
    fixed = sampler([SamplingParams(max_tokens=1, seed=77, **case)] * ROWS, VOCAB, histories, prompts)
    for call in range(calls):
        names = range(call * ROWS, (call + 1) * ROWS)
        if by == "position":
            picks = fixed(given, list(names))
        else:
            batch = [SamplingParams(max_tokens=1, seed=name, **case) for name in names]
            picks = sampler(batch, VOCAB, histories, prompts)(given, [9] * ROWS)
        counts += np.bincount(np.array(picks.tokens), minlength=VOCAB)
    assert counts.sum() == calls * ROWS
    assert not counts[p == 0.0].any()
    assert abs(deviation(counts, p)) < 4.0


def test_a_wide_vocabulary_has_no_bias_along_ids() -> None:
    vocab_size, rows, calls = 262144, 4, 40
    logits = (np.random.default_rng(3).standard_normal(vocab_size)).astype(np.float32)
    p = exact(logits.astype(np.float64), SamplingParams(max_tokens=1))
    given = mx.array(np.repeat(logits[None], rows, axis=0))
    fixed = sampler([SamplingParams(max_tokens=1, seed=5)] * rows, vocab_size)
    upto = np.cumsum(p)
    places = []
    for call in range(calls):
        tokens = np.array(fixed(given, list(range(call * rows, (call + 1) * rows))).tokens)
        places.extend(upto[tokens].tolist())
    counts, _ = np.histogram(places, bins=8, range=(0, 1))
    assert abs(deviation(counts, np.full(8, 1 / 8))) < 4.0
