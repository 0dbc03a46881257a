"""(M8) What the model thinks of a prompt's own tokens, against mlx-lm's network in one forward over all of it."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from engine_driver import Driver, Outcome, assert_same_or_tied, prefix_cache, reference, request, upstream_math
from tiny_models import CONFIGS, capabilities, model, prompt

from millpond.model import scoring
from millpond.prefix.query import End
from millpond.types import ErrorKind, TokenLogprob

TOP = 3
CLOSE = 2e-4
"""Of log-probabilities of a model in float32, in chunks or at once."""


def driver(kind: str, **options: object) -> Driver:
    return Driver(model(kind), capabilities=capabilities(kind), **options)  # type: ignore[arg-type]


def expected(kind: str, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities float [len(tokens), V] of what comes behind each token."""
    with upstream_math():
        logits = model(kind).network(mx.array([list(tokens)]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def check(kind: str, tokens: Sequence[int], scores: list[TokenLogprob], top: int = TOP) -> None:
    right = expected(kind, tokens)
    assert [one.token for one in scores] == list(tokens[1:])
    for place, one in enumerate(scores):
        row = right[place]
        assert one.logprob == pytest.approx(row[one.token], abs=CLOSE)
        assert len(one.top) == top
        assert [value for _, value in one.top] == pytest.approx(np.sort(row)[::-1][:top].tolist(), abs=CLOSE)
        assert all(value == pytest.approx(row[token], abs=CLOSE) for token, value in one.top)
        likelier = int((row > row[one.token] + CLOSE).sum())
        assert likelier < one.rank <= int((row > row[one.token] - CLOSE).sum()) + 1
        if one.rank <= top:
            found = dict(one.top)
            assert found[one.token] == one.logprob, "the same number wherever it is told"


@pytest.mark.often("gemma3_text", "lfm2", "deepseek")
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_token_of_the_prompt_but_the_first(kind: str) -> None:
    """Among others that are not scored, in chunks, beyond windows."""
    driven = driver(kind, max_batch=5, max_chunk=128)
    lengths = [1, 2, 64, 65, 66, 300]
    for length in lengths:
        driven.submit(request(f"s{length}", prompt(length), 6, prompt_logprobs=TOP, logprobs=1))
        driven.submit(request(f"p{length}", prompt(length, 1), 6))
    driven.run()
    for length in lengths:
        check(kind, prompt(length), driven.outcomes[f"s{length}"].prompt_logprobs)
        assert driven.outcomes[f"p{length}"].prompt_logprobs == []
        for name, tokens in (f"s{length}", prompt(length)), (f"p{length}", prompt(length, 1)):
            answer = reference(model(kind).network, tokens, 6)
            assert_same_or_tied(model(kind).network, tokens, driven.outcomes[name].tokens, answer)


def test_without_the_likeliest() -> None:
    driven = driver("llama")
    driven.submit(request("x", prompt(70), 2, prompt_logprobs=0))
    driven.run()
    check("llama", prompt(70), driven.outcomes["x"].prompt_logprobs, top=0)


def test_the_cache_is_neither_asked_nor_filled() -> None:
    """All of it has to be computed; what was cached stays as it was."""
    cache = prefix_cache(model("llama"))
    driven = driver("llama", cache=cache)
    outcomes: list[Outcome] = []
    for number, scored in enumerate((None, TOP, None)):
        driven.submit(request(f"r{number}", prompt(200), 2, **({} if scored is None else {"prompt_logprobs": scored})))
        driven.run()
        outcomes.append(driven.outcomes[f"r{number}"])
    reports = [outcome.prefix for outcome in outcomes]
    assert [report.memory for report in reports if report] == [0, 0, 199]
    assert reports[1] is not None
    assert reports[1].end == End.UNWANTED
    check("llama", prompt(200), outcomes[1].prompt_logprobs)
    assert outcomes[0].tokens == outcomes[1].tokens == outcomes[2].tokens


@pytest.mark.often("llama")
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v2"])
def test_an_answer_that_fills_blocks(kind: str) -> None:
    """Its prompt is nowhere in the cache, so nothing of it can be kept; beside one of which all is."""
    cache = prefix_cache(model(kind))
    driven = driver(kind, cache=cache)
    driven.submit(request("scored", prompt(60), 80, prompt_logprobs=TOP))
    driven.submit(request("plain", prompt(60, 1), 80))
    driven.run()
    for name, seed in (("scored", 0), ("plain", 1)):
        tokens, network = prompt(60, seed), model(kind).network
        assert_same_or_tied(network, tokens, driven.outcomes[name].tokens, reference(network, tokens, 80))
    check(kind, prompt(60), driven.outcomes["scored"].prompt_logprobs)
    other = prefix_cache(model(kind))
    without = driver(kind, cache=other)
    without.submit(request("plain", prompt(60, 1), 80))
    without.run()
    assert cache.blocks == other.blocks > 0


def test_told_once_though_it_is_computed_twice() -> None:
    """Rows that outgrow the budget give way and come back."""
    limit = 1500 * sum(spec.token_bytes for spec in model("llama").specs)
    driven = driver("llama", max_batch=4, limit_bytes=limit)
    for index in range(3):
        driven.submit(request(f"r{index}", prompt(60 + index), 300, prompt_logprobs=1))
    driven.run()
    assert driven.beat.counters.preemptions > 0
    for index in range(3):
        check("llama", prompt(60 + index), driven.outcomes[f"r{index}"].prompt_logprobs, top=1)


def test_numbers_that_are_not_finite_are_an_error_of_that_request(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = driver("llama")
    measured = scoring._measured

    def broken(logits: mx.array, *rest: object) -> list[TokenLogprob]:
        return measured(logits * float("nan"), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scoring, "_measured", broken)
    driven.submit(request("bad", prompt(40), 5, prompt_logprobs=1))
    driven.submit(request("good", prompt(40), 5))
    driven.run()
    failure = driven.outcomes["bad"].failure
    assert failure is not None
    assert (failure.kind, "not finite" in failure.message) == (ErrorKind.ENGINE, True)
    assert len(driven.outcomes["good"].tokens) == 5
