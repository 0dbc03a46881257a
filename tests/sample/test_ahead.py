"""Sampling behind draft tokens: the same tokens, and the same distribution, as without (H3)."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from sampler_support import sampler, state
from statistics_support import deviation

from millpond.engine.inflight import agreeing
from millpond.sample.sampler import BatchSampler
from millpond.types import SamplingParams

VOCAB = 40
DRAWS = 24_000
WAYS: dict[str, dict[str, object]] = {
    "plain": {},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 6},
    "min_p": {"min_p": 0.1},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "all": {"top_p": 0.9, "top_k": 12, "min_p": 0.02, "repetition_penalty": 1.2, "logit_bias": {3: 2.0, 7: -5.0}},
}


def params(seed: int, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=9, temperature=0.9, seed=seed, **fields)  # type: ignore[arg-type]


def logits_after(token: int) -> mx.array:
    """A model with a memory of one token."""
    return mx.random.normal((1, VOCAB), key=mx.random.key(token)) * 2.0


TABLE = mx.concatenate([logits_after(token) for token in range(VOCAB)])


@pytest.mark.parametrize("way", WAYS)
def test_each_column_draws_what_it_would_draw_alone(way: str) -> None:
    prompts = [[1, 2, 3], [4], [5, 5, 6, 7], [8, 9]]
    drafts = [[3, 3, 9], [], [5], [30, 31, 32, 33, 34]]
    everybody = [params(seed, **WAYS[way]) for seed in range(4)]
    everybody[1] = SamplingParams(max_tokens=9, temperature=0.0, **WAYS[way])  # type: ignore[arg-type]
    histories = [[*prompt, seed + 10] for seed, prompt in enumerate(prompts)]
    lengths = [len(prompt) for prompt in prompts]
    rows = zip(everybody, histories, lengths, strict=True)
    batch = [state(one, VOCAB, seen[:end], seen[end:]) for one, seen, end in rows]
    places = [(row, place) for row, draft in enumerate(drafts) for place in range(len(draft) + 1)]
    seen = [[*histories[row], *drafts[row][:place]] for row, place in places]
    logits = mx.concatenate([TABLE[one[-1]][None] for one in seen])
    for _ in range(2):  # the tables go on being right
        columns = [one for row, draft in zip(batch, drafts, strict=True) for one in row.ahead(draft)]
        picks = BatchSampler(columns, VOCAB)(logits, [len(one) for one in seen])
        for index, (row, _place) in enumerate(places):
            alone = sampler([everybody[row]], VOCAB, [seen[index]], [lengths[row]])
            expected = alone(logits[index][None], [len(seen[index])])
            assert picks.tokens[index].item() == expected.tokens[0].item(), (way, row)


@pytest.mark.often("all-random", "top_p-random", "min_p-likeliest")
@pytest.mark.parametrize("draft", ["random", "likeliest"])
@pytest.mark.parametrize("way", WAYS)
def test_the_distribution_is_that_of_plain_decoding(way: str, draft: str) -> None:
    """The second token of many answers, verified behind a draft of the first, against its probabilities."""
    first = 0
    chooser = np.random.default_rng(5)
    likeliest = int(mx.argmax(TABLE[first]).item())
    guesses = [likeliest] * DRAWS if draft == "likeliest" else chooser.integers(0, VOCAB, DRAWS).tolist()
    everybody = [params(seed, **WAYS[way]) for seed in range(DRAWS)]
    rows = [state(one, VOCAB, [first]) for one in everybody]
    batch = BatchSampler([one for row, guess in zip(rows, guesses, strict=True) for one in row.ahead([guess])], VOCAB)
    columns = mx.array([token for guess in guesses for token in (first, guess)])
    drawn = np.array(batch(TABLE[columns], [1, 2] * DRAWS).tokens).reshape(DRAWS, 2).tolist()
    taken = [agreeing(tokens, [guess]) for tokens, guess in zip(drawn, guesses, strict=True)]
    firsts = np.bincount([tokens[0] for tokens in taken], minlength=VOCAB)
    assert abs(deviation(firsts, probabilities(WAYS[way], [first], 1))) < 4
    both = [tokens for tokens in taken if len(tokens) == 2]
    assert len(both) > DRAWS / VOCAB / 4
    most = max(range(VOCAB), key=lambda token: sum(tokens[0] == token for tokens in both))
    seconds = np.bincount([tokens[1] for tokens in both if tokens[0] == most], minlength=VOCAB)
    if seconds.sum() > 2000:
        assert abs(deviation(seconds, probabilities(WAYS[way], [first, most], 1))) < 4


def probabilities(way: dict[str, object], history: list[int], prompt: int) -> npt.NDArray[np.float64]:
    """By definition, in float64."""
    fields = params(0, **way)
    logits = np.array(TABLE[history[-1]], dtype=np.float64)
    for token in set(history):
        logits[token] = (
            logits[token] / fields.repetition_penalty
            if logits[token] > 0
            else (logits[token] * fields.repetition_penalty)
        )
    for token in history[prompt:]:
        logits[token] -= fields.frequency_penalty
    for token in set(history[prompt:]):
        logits[token] -= fields.presence_penalty
    for token, bias in fields.logit_bias.items():
        logits[token] += bias
    chances = np.exp((logits - logits.max()) / fields.temperature)
    chances /= chances.sum()
    kept = np.ones(VOCAB, dtype=bool)
    order = np.argsort(-chances, kind="stable")
    if fields.top_k:
        kept[order[fields.top_k :]] = False
    within = np.where(kept, chances, 0.0)
    within /= within.sum()
    before = np.concatenate([[0.0], np.cumsum(within[order])[:-1]])
    kept[order[before >= fields.top_p]] = False
    kept &= chances >= fields.min_p * chances.max()
    chances = np.where(kept, chances, 0.0)
    result: npt.NDArray[np.float64] = chances / chances.sum()
    return result
