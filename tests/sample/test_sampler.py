from __future__ import annotations

from random import Random
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_support import sampler

from millpond.sample.sampler import Picks
from millpond.types import SamplingParams

VOCAB = 1500


def params(**fields: float | dict[int, float]) -> SamplingParams:
    return msgspec.convert({"max_tokens": 1, **fields}, SamplingParams)


def some_logits(rows: int, vocab_size: int = VOCAB, seed: int = 0, spread: float = 3.0) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, vocab_size)) * spread).astype(np.float32)


def pick(logits: npt.NDArray[np.float32] | mx.array, batch: list[SamplingParams], positions: list[int]) -> Picks:
    return sampler(batch, logits.shape[1])(mx.array(logits), positions)


def ids(picks: Picks) -> list[int]:
    return [int(token) for token in np.array(picks.tokens)]


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.3, "top_p": 0.5, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.8},
    {"temperature": 0.8, "logit_bias": {3: 4.0, 1400: 5.0}},
    {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.1},
    {"temperature": 0.9, "top_p": 0.95, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 20},
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=24), st.randoms(use_true_random=False))
def test_a_row_is_the_same_alone_and_in_any_batch(kinds: list[dict[str, Any]], random: Random) -> None:
    rows = len(kinds)
    logits = some_logits(rows)
    batch = [params(seed=row * 31, **kind) for row, kind in enumerate(kinds)]
    positions = [7 + row * row for row in range(rows)]
    histories = [[row, 5, 6, 7, 7] for row in range(rows)]
    together = sampler(batch, VOCAB, histories, [2] * rows)(mx.array(logits), positions)
    order = random.sample(range(rows), rows)
    other = sampler([batch[row] for row in order], VOCAB, [histories[row] for row in order], [2] * rows)
    permuted = other(mx.array(logits[order]), [positions[row] for row in order])
    tokens = ids(together)
    assert ids(permuted) == [tokens[row] for row in order]
    for row in range(rows):
        single = sampler([batch[row]], VOCAB, [histories[row]], [2])
        alone = single(mx.array(logits[row : row + 1]), [positions[row]])
        assert ids(alone) == [tokens[row]]
        asked = batch[row].logprobs
        if asked is not None:
            place = order.index(row)
            assert together.logprobs_of(row, asked) == alone.logprobs_of(0, asked)
            assert together.logprobs_of(row, asked) == permuted.logprobs_of(place, asked)


def test_a_call_changes_no_state() -> None:
    twice = sampler([params(seed=1), params(seed=2, top_p=0.9)], VOCAB)
    logits = mx.array(some_logits(2))
    assert ids(twice(logits, [5, 6])) == ids(twice(logits, [5, 6]))


def test_global_random_state_is_neither_used_nor_moved() -> None:
    logits = mx.array(some_logits(4))
    own = sampler([params(seed=row) for row in range(4)], VOCAB)
    mx.random.seed(1)
    first = ids(own(logits, [1, 2, 3, 4]))
    after = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(1)
    assert mx.random.uniform(shape=(4,)).tolist() == after
    assert ids(own(logits, [1, 2, 3, 4])) == first


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_greedy_is_argmax_ties_included(dtype: mx.Dtype) -> None:
    logits = mx.array(some_logits(16, spread=0.5)).astype(dtype)
    # Rounding makes ties among the likeliest.
    logits = mx.round(logits * 2) / 2
    picks = pick(logits, [params(temperature=0.0)] * 16, [0] * 16)
    assert picks.tokens.dtype == mx.int32
    assert ids(picks) == mx.argmax(logits, axis=-1).tolist()


def test_greedy_after_bias_and_penalties() -> None:
    logits = np.zeros((3, VOCAB), dtype=np.float32)
    logits[:, 10], logits[:, 20] = 5.0, 4.0
    batch = [
        params(temperature=0.0, logit_bias={10: -100.0}),
        params(temperature=0.0, repetition_penalty=2.0),
        params(temperature=0.0, logit_bias={1499: 100.0}),
    ]
    biased = sampler(batch, VOCAB, [[], [10], []], [0, 1, 0])
    assert ids(biased(mx.array(logits), [1, 1, 1])) == [20, 20, 1499]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_short_floats_draw_as_their_float32_values(dtype: mx.Dtype, kind: dict[str, Any]) -> None:
    logits = mx.array(some_logits(8)).astype(dtype)
    batch = [params(seed=row, **kind) for row in range(8)]
    histories, prompts = [[1, 2, 3]] * 8, [1] * 8
    short = sampler(batch, VOCAB, histories, prompts)(logits, [3] * 8)
    full = sampler(batch, VOCAB, histories, prompts)(logits.astype(mx.float32), [3] * 8)
    assert ids(short) == ids(full)


def test_nothing_is_evaluated_in_a_call() -> None:
    batch = [params(seed=row, **kind) for row, kind in enumerate(KINDS)]
    history, prompts = [[1, 2, 3]] * len(batch), [1] * len(batch)

    def draw(logits: mx.array) -> list[mx.array]:
        return sampler(batch, VOCAB, history, prompts)(logits, [1] * len(batch)).arrays()

    def evaluate(logits: mx.array) -> list[mx.array]:
        arrays = draw(logits)
        mx.eval(arrays)
        return arrays

    # While MLX traces a function, whatever asks for a value raises; the traced graph itself is never run.
    logits = mx.array(some_logits(len(KINDS)))
    assert len(mx.compile(draw)(logits)) == 5
    with pytest.raises(ValueError, match="eval"):
        mx.compile(evaluate)(logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [[float("nan")], [float("inf")], [-float("inf")] * VOCAB])
def test_a_bad_row_is_flagged_and_the_others_untouched(kind: dict[str, Any], poison: list[float]) -> None:
    logits = some_logits(3)
    batch = [params(seed=row, **kind) for row in range(3)]
    history, prompts = [[1, 2]] * 3, [1] * 3
    good = sampler(batch, VOCAB, history, prompts)(mx.array(logits), [4] * 3)
    logits[1, : len(poison)] = poison
    mixed = sampler(batch, VOCAB, history, prompts)(mx.array(logits), [4] * 3)
    assert good.bad.tolist() == [False, False, False]
    assert mixed.bad.tolist() == [False, True, False]
    tokens = ids(mixed)
    assert [tokens[0], tokens[2]] == [ids(good)[0], ids(good)[2]]
    assert 0 <= tokens[1] < VOCAB


def test_a_nan_anywhere_is_seen() -> None:
    logits = some_logits(VOCAB // 50)
    for row in range(len(logits)):
        logits[row, row * 50] = np.nan
    assert np.array(pick(logits, [params(temperature=0.0)] * len(logits), [0] * len(logits)).bad).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind["temperature"] > 0])
def test_masked_tokens_are_never_drawn(kind: dict[str, Any]) -> None:
    rows = 200
    logits = np.full((rows, VOCAB), -np.inf, dtype=np.float32)
    allowed = [17, 640, 1311]
    logits[:, allowed] = [0.0, 0.5, -0.5]
    fields = {**kind, "logit_bias": {}}
    batch = [params(seed=row, **fields) for row in range(rows)]
    picks = sampler(batch, VOCAB, [[1, 2]] * rows, [1] * rows)(mx.array(logits), [0] * rows)
    assert not np.array(picks.bad).any()
    assert set(ids(picks)) <= set(allowed)


def test_bias_of_100_forces_and_forbids() -> None:
    logits = some_logits(50)
    best = int(logits[0].argmax())
    forced = pick(logits, [params(seed=row, logit_bias={123: 100.0}) for row in range(50)], [0] * 50)
    assert set(ids(forced)) == {123}
    same = np.repeat(logits[:1], 50, axis=0)
    barred = pick(same, [params(seed=row, logit_bias={best: -100.0}) for row in range(50)], [0] * 50)
    assert best not in ids(barred)


def test_top_k_beyond_the_vocabulary_is_off() -> None:
    logits = some_logits(20)
    wide = pick(logits, [params(seed=row, top_k=10**6) for row in range(20)], [9] * 20)
    off = pick(logits, [params(seed=row) for row in range(20)], [9] * 20)
    assert ids(wide) == ids(off)


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-3}, {"temperature": 1e-42}],
)
def test_the_narrowest_settings_are_greedy(narrow: dict[str, Any]) -> None:
    rng = np.random.default_rng(4)
    logits = np.stack([rng.permutation(VOCAB) for _ in range(30)]).astype(np.float32) * 0.05
    tokens = ids(pick(logits, [params(seed=row, **narrow) for row in range(30)], [2] * 30))
    assert tokens == logits.argmax(axis=1).tolist()


def test_top_k_of_ties_keeps_the_lower_ids() -> None:
    logits = np.zeros((100, VOCAB), dtype=np.float32)
    tokens = ids(pick(logits, [params(seed=row, top_k=3) for row in range(100)], [2] * 100))
    assert set(tokens) == {0, 1, 2}


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 50257])
def test_odd_vocabularies(vocab_size: int) -> None:
    logits = some_logits(len(KINDS), vocab_size)
    batch = [params(seed=row, **{**kind, "logit_bias": {}}) for row, kind in enumerate(KINDS)]
    odd = sampler(batch, vocab_size, [[0]] * len(batch), [1] * len(batch))
    picks = odd(mx.array(logits), [1] * len(batch))
    assert all(0 <= token < vocab_size for token in ids(picks))
    assert len(picks.logprobs_of(10, min(20, vocab_size)).top) == min(20, vocab_size)


def test_shapes_are_checked() -> None:
    single = sampler([params()], VOCAB)
    with pytest.raises(ValueError, match=str(VOCAB)):
        single(mx.zeros((1, VOCAB - 1)), [0])
    with pytest.raises(ValueError, match="positions"):
        single(mx.zeros((1, VOCAB)), [0, 1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": float("nan")},
        {"top_p": float("nan")},
        {"min_p": float("inf")},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": float("-inf")},
        {"logit_bias": {3: float("nan")}},
    ],
)
def test_numbers_that_nothing_can_be_drawn_with_are_refused_one_request_at_a_time(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sampler([params(), params(**wrong)], VOCAB)


def test_numbers_of_any_size_can_be_batched() -> None:
    """Whatever a request may hold by its types: the batch must not find out what its own state took."""
    sizes = [{"top_k": 1 << 62}, {"top_k": -(1 << 62)}, {"seed": -1}, {"seed": 1 << 70}, {"top_p": 1e300}]
    batch = [params(**size) for size in [*sizes, {"min_p": 3.0}, {"top_p": -1.0}, {"temperature": 5e-324}]]
    picks = sampler(batch, VOCAB)(mx.array(some_logits(len(batch))), [0] * len(batch))
    assert all(0 <= token < VOCAB for token in ids(picks))
