"""Penalties and logit_bias against a plain per-token reference."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_support import state

from millpond.sample.edits import apply
from millpond.types import SamplingParams

VOCAB = 23
WIDE = 3000
"""Room for tables that have grown several times."""
SIZES = (0, 1, 5, 15, 16, 17, 31, 32, 33, 64, 65, 129, 300, 1024)
"""Entries and tokens: about each length at which a table may have to grow."""


class Row(NamedTuple):
    params: SamplingParams
    prompt: list[int]
    answer: list[int]


def naive(logits: npt.NDArray[np.float32], row: Row) -> npt.NDArray[np.float64]:
    out = logits.astype(np.float64)
    seen, times = {*row.prompt, *row.answer}, Counter(row.answer)
    for token in range(len(out)):
        penalty = row.params.repetition_penalty
        if penalty != 1.0 and token in seen:
            out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
        if times[token]:
            out[token] -= row.params.presence_penalty + row.params.frequency_penalty * times[token]
        out[token] += row.params.logit_bias.get(token, 0.0)
    return out


def edited(logits: mx.array, rows: list[Row]) -> mx.array:
    vocab_size = logits.shape[1]
    return apply(logits, [state(row.params, vocab_size, row.prompt, row.answer).table for row in rows])


def some_row(vocab_size: int, biases: int, read: int, drawn: int, penalties: tuple[float, ...], seed: int) -> Row:
    chooser = random.Random(seed)
    repetition, presence, frequency = penalties
    params = SamplingParams(
        max_tokens=1,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias={
            token: chooser.uniform(-100, 100) for token in chooser.sample(range(vocab_size), min(biases, vocab_size))
        },
    )
    prompt, answer = ([chooser.randrange(vocab_size) for _ in range(count)] for count in (read, drawn))
    return Row(params, prompt, answer)


numbers = st.sampled_from(SIZES)
penalties = st.tuples(st.sampled_from([1.0, 1.3, 0.7]), st.sampled_from([0.0, 0.5, -2.0]), st.sampled_from([0.0, 0.25]))
sizes = st.lists(st.tuples(numbers, numbers, numbers, penalties), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([VOCAB, WIDE]), sizes, st.integers(0, 2**32 - 1))
def test_like_the_reference(vocab_size: int, sizes: list[tuple[int, int, int, tuple[float, ...]]], seed: int) -> None:
    """Few entries or a thousand, from the bias, the prompt or the answer; the rows beside it have their own."""
    batch = [some_row(vocab_size, *size, seed + place) for place, size in enumerate(sizes)]
    logits = (np.random.default_rng(seed).standard_normal((len(batch), vocab_size)) * 5).astype(np.float32)
    changed = np.array(edited(mx.array(logits), batch))
    for place, row in enumerate(batch):
        np.testing.assert_allclose(changed[place], naive(logits[place], row), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("penalties", [(1.3, 0.0, 0.0), (1.0, 0.5, 0.25)])
def test_a_table_is_right_after_every_token(penalties: tuple[float, ...]) -> None:
    """While it grows beyond its first room, three times."""
    row = some_row(WIDE, 5, 20, 150, penalties, 7)
    logits = np.random.default_rng(1).standard_normal((1, WIDE)).astype(np.float32)
    growing = state(row.params, WIDE, row.prompt)
    for done, token in enumerate(row.answer, start=1):
        growing.take(token)
        changed = np.array(apply(mx.array(logits), [growing.table]))[0]
        expected = naive(logits[0], row._replace(answer=row.answer[:done]))
        np.testing.assert_allclose(changed, expected, rtol=1e-5, atol=1e-4)


def test_what_may_come_is_apart_from_what_has_come() -> None:
    """Tables for draft tokens grow without their row's, whichever of them has to grow first."""
    row = some_row(WIDE, 3, 5, 8, (1.2, 0.3, 0.1), 3)
    logits = mx.zeros((1, WIDE)) + 1.0
    growing = state(row.params, WIDE, row.prompt, row.answer)
    for draft in ([5, 5, 6, *range(100, 140)], [5, 7], []):
        before = apply(logits, [growing.table]).tolist()
        for done, one in enumerate(growing.ahead(draft)):
            alone = state(row.params, WIDE, row.prompt, [*row.answer, *draft[:done]])
            assert apply(logits, [one.table]).tolist() == apply(logits, [alone.table]).tolist()
        assert apply(logits, [growing.table]).tolist() == before


def test_rows_without_edits_keep_every_bit() -> None:
    logits = mx.array(np.random.default_rng(0).standard_normal((3, VOCAB)).astype(np.float32))
    plain = Row(SamplingParams(max_tokens=1), [], [])
    biased = plain._replace(params=SamplingParams(max_tokens=1, logit_bias={3: -100.0, 7: 100.0}))
    changed = edited(logits, [plain, biased, plain])
    assert bool(mx.array_equal(changed[0], logits[0]))
    assert bool(mx.array_equal(changed[2], logits[2]))
    assert int(mx.argmax(changed[1])) == 7
    assert int(mx.argmin(changed[1])) == 3


def test_one_row_of_many_entries_costs_the_others_nothing() -> None:
    """What is gathered and scattered is the entries there are, not as many for each row as for the longest."""
    few, many = (Row(SamplingParams(max_tokens=1, logit_bias=dict.fromkeys(range(n), 1.0)), [], []) for n in (1, 1024))
    logits = mx.zeros((16, WIDE))

    def work(batch: list[Row]) -> int:
        mx.eval(logits)
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        mx.eval(edited(logits, batch))
        return mx.get_peak_memory() - held

    assert work([many] + [few] * 15) - work([few] * 16) < 1024 * 40


def test_the_given_logits_are_left_alone() -> None:
    logits = mx.zeros((1, VOCAB))
    mx.eval(edited(logits, [Row(SamplingParams(max_tokens=1, logit_bias={0: 5.0}), [], [])]))
    assert float(mx.max(mx.abs(logits))) == 0.0


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    params = SamplingParams(max_tokens=1, repetition_penalty=2.0, logit_bias={VOCAB: 5.0, -1: 5.0})
    logits = mx.ones((2, VOCAB))
    strange = Row(params, [VOCAB, VOCAB + 100, -2], [VOCAB, -1])
    assert bool(mx.array_equal(edited(logits, [strange, strange]), logits))


def test_masked_tokens_stay_masked() -> None:
    params = SamplingParams(max_tokens=1, repetition_penalty=1.5, logit_bias={2: 100.0})
    logits = mx.where(mx.arange(VOCAB) == 2, -mx.inf, 1.0)[None]
    assert float(edited(logits, [Row(params, [2], [2])])[0, 2]) == -np.inf
