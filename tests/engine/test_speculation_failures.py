"""Drafts that go wrong: failures, numbers that are not finite, ids that are none, memory that ends."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
import msgspec
import pytest
from engine_driver import Driver
from speculation_support import (
    SPECULATED,
    Oracle,
    capabilities,
    crowd,
    model,
    plain,
    prompt,
    real_draft,
    request,
    same,
)
from tiny_models import VOCAB, save

from millpond.engine.inflight import InflightStep, Steps
from millpond.model.load import LoadedModel, load
from millpond.sample.state import SamplingState
from millpond.speculate.controller import Controller
from millpond.speculate.draft import Draft
from millpond.speculate.lookup import Lookup, PastOutputs
from millpond.types import Finish, SpecMode, SpecSettings, Speculation


def test_a_draft_model_that_fails_costs_its_guesses_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = real_draft("llama")
    calls = 0
    propose = draft.propose

    def failing(wanted: Mapping[str, int], tokens: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        nonlocal calls
        calls += 1
        if calls in (3, 5, 6):
            raise RuntimeError("out of memory, say")
        return propose(wanted, tokens)

    monkeypatch.setattr(draft, "propose", failing)
    requests = crowd(4, seed=6)
    expected = plain("llama", requests)
    driver = Driver(model("llama"), capabilities=capabilities("llama"), spec=SPECULATED, draft=draft)
    for one in requests:
        driver.submit(one)
    driver.run()
    same(driver.outcomes, expected)
    assert calls == 6  # as often as it may fail


@pytest.mark.often("Draft-begin", "Controller-choose", "PastOutputs-of", "Lookup-propose", "Draft-read")
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (Lookup, "extend"),
        (Lookup, "propose"),
        (PastOutputs, "of"),
        (PastOutputs, "add"),
        (Draft, "begin"),
        (Draft, "ready"),
        (Draft, "read"),
        (Controller, "choose"),
        (Controller, "verified"),
    ],
)
def test_whatever_guessing_raises_costs_guesses_and_nothing_else(
    kind: type, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = crowd(5, seed=6)
    expected = plain("llama", requests)
    works, calls = getattr(kind, method), 0

    def failing(this: object, *args: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls in (3, 4, 9):
            raise OverflowError("an id that is none, say")
        return works(this, *args, **named)

    monkeypatch.setattr(kind, method, failing)
    mode = SpecMode.DRAFT if kind is Draft else SpecMode.NGRAM
    driver = Driver(
        model("llama"),
        capabilities=capabilities("llama"),
        spec=SpecSettings(default=Speculation(mode=mode, tokens=5, adaptive=method == "choose"), shared=True),
        draft=real_draft("llama") if kind is Draft else None,
    )
    for one in requests:
        driver.submit(one)
    driver.run()
    same(driver.outcomes, expected)
    assert calls >= 3
    counters = driver.beat.counters
    assert counters.failed_steps == 0
    assert counters.prefill_tokens == sum(len(one.tokens) for one in requests)
    assert counters.spec.proposed > 0, "those that nothing was wrong with went on"


def test_drafts_for_which_nothing_can_be_drawn_end_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sampling has to know of a row's draft tokens cannot be made: nobody else's step is lost."""
    requests = [request(f"r{n}", prompt(20 + n, n), 24, presence_penalty=0.1, seed=n) for n in range(3)]
    expected = plain("llama", requests)
    oracle = Oracle({name: outcome.tokens for name, outcome in expected.items()}, {one.id: 1.0 for one in requests})
    ahead = SamplingState.ahead

    def failing(state: SamplingState, draft: Sequence[int]) -> list[SamplingState]:
        if state.params.seed == 1 and draft:
            raise RuntimeError("no memory for so many columns, say")
        return ahead(state, draft)

    monkeypatch.setattr(SamplingState, "ahead", failing)
    driver = Driver(model("llama"), capabilities=capabilities("llama"), spec=SPECULATED, draft=oracle)
    for one in requests:
        driver.submit(one)
    driver.run()
    assert driver.outcomes.pop("r1").failure is not None
    same(driver.outcomes, {name: outcome for name, outcome in expected.items() if name != "r1"})
    assert driver.beat.counters.failed_steps == 0
    assert driver.beat.counters.prefill_tokens == sum(len(one.tokens) for one in requests)


def test_a_verifying_step_that_raises_is_done_again_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request(f"r{n}", prompt(20 + n, n), 24) for n in range(3)]
    expected = plain("llama", requests)
    oracle = Oracle({name: outcome.tokens for name, outcome in expected.items()}, {one.id: 1.0 for one in requests})
    driver = Driver(model("llama"), capabilities=capabilities("llama"), spec=SPECULATED, draft=oracle)
    verifying = Steps.verifying
    raised = 0

    def failing(steps: Steps, *args: object) -> InflightStep:
        nonlocal raised
        raised += 1
        if raised == 2:
            raise RuntimeError("no memory for so many columns, say")
        return verifying(steps, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Steps, "verifying", failing)
    for one in requests:
        driver.submit(one)
    driver.run()
    same(driver.outcomes, expected)
    assert raised == 2
    assert driver.beat.counters.failed_steps == 1


def poisonable(tokens: set[int]) -> tuple[LoadedModel, int]:
    """The tiny llama, and a token none of ``tokens`` that makes everything behind it not finite."""
    poison = next(token for token in range(VOCAB) if token not in tokens)
    fresh = load(save("llama", Path(mkdtemp())), 0, lambda _: None)
    rows = fresh.network.model.embed_tokens.weight
    fresh.network.model.embed_tokens.weight = mx.where((mx.arange(VOCAB) == poison)[:, None], mx.nan, rows)
    fresh.network.lm_head = nn.Linear(rows.shape[1], VOCAB, bias=False)  # with rows of its own, none of them poisoned
    fresh.network.lm_head.weight = rows
    fresh.network.args.tie_word_embeddings = False
    return fresh, poison


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("victims", [("r1",), ("r0", "r2"), ("r0", "r1", "r2")])
def test_numbers_that_are_not_finite_behind_a_draft_harm_nobody(
    victims: tuple[str, ...], cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain decoding would never have fed that token: the requests are computed again, without drafts, and whoever
    gets their rows finds them clean, also when they were cancelled meanwhile."""
    requests = [request(f"r{n}", prompt(20 + n, n), 24) for n in range(3)]
    late = request("late", prompt(15, 77), 30)
    expected = plain("llama", [*requests, late])
    fresh, poison = poisonable({t for one in [*requests, late] for t in (*one.tokens, *expected[one.id].tokens)})
    oracle = Oracle({name: outcome.tokens for name, outcome in expected.items()}, {one.id: 1.0 for one in requests})
    propose = oracle.propose
    armed = False

    def poisoned(wanted: Mapping[str, int], tokens: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        nonlocal armed
        found = propose(wanted, tokens)
        if not armed and set(victims) <= set(found):
            armed = True
            found |= {name: [poison, 3, 3, 3] for name in victims}
        return found

    monkeypatch.setattr(oracle, "propose", poisoned)
    driver = Driver(fresh, capabilities=capabilities("llama"), spec=SPECULATED, draft=oracle)
    for one in requests:
        driver.submit(one)
    done = False

    def watch(turn: int) -> None:
        nonlocal done
        if armed and not done:
            done = True
            driver.submit(late)
            if cancelled:
                driver.cancel(victims[-1])

    driver.run(watch)
    assert armed
    if cancelled and driver.outcomes[victims[-1]].finish is Finish.CANCELLED:
        driver.outcomes.pop(victims[-1])
    same(driver.outcomes, expected)


class Overflowing(nn.Module):
    """A model whose logits at one position are not finite."""

    def __init__(self, inner: nn.Module, position: int) -> None:
        super().__init__()
        self.inner = inner
        self.position = position

    def __call__(self, tokens: mx.array, cache: Sequence[object]) -> mx.array:
        offset = cache[0].offset  # type: ignore[attr-defined]
        first = offset if isinstance(offset, mx.array) else mx.array([offset])
        places = first[:, None] + mx.arange(tokens.shape[1])[None]
        logits = self.inner(tokens, cache=cache)
        return mx.where((places == self.position)[:, :, None], mx.nan, logits)

    @property
    def layers(self) -> object:
        return self.inner.layers


def test_a_request_that_plain_decoding_fails_fails_with_drafts_too() -> None:
    """With the same tokens before it, and no others."""
    one = request("r", prompt(20), 24)
    truth = plain("llama", [one])["r"].tokens
    outcomes = []
    for drafted in (False, True):
        broken = dataclasses.replace(model("llama"), network=Overflowing(model("llama").network, 20 + 6))
        driver = Driver(
            broken,
            capabilities=capabilities("llama"),
            spec=SPECULATED if drafted else None,
            draft=Oracle({"r": truth}, {"r": 1.0}) if drafted else None,
        )
        driver.submit(one)
        driver.run()
        outcomes.append(driver.outcomes["r"])
    for outcome in outcomes:
        assert outcome.failure is not None
        assert outcome.tokens == truth[:7]


def test_predicted_ids_that_the_model_does_not_have_are_never_fed() -> None:
    one = request("r", prompt(20), 40)
    truth = plain("llama", [one])["r"].tokens
    prediction = [token for pair in itertools.pairwise(truth) for token in (*pair, 10**6, VOCAB, -5)]
    driver = Driver(
        model("llama"),
        capabilities=capabilities("llama"),
        spec=SpecSettings(default=Speculation(mode=SpecMode.NGRAM, adaptive=False)),
    )
    driver.submit(msgspec.structs.replace(one, prediction=prediction))
    driver.run()
    assert driver.outcomes["r"].tokens == truth


def test_padding_makes_no_room_for_itself() -> None:
    """A long row whose answer ends under a capacity border, beside a short one with drafts."""
    long, short = request("long", prompt(240), 12), request("short", prompt(10), 60)
    expected = plain("llama", [long, short])
    truths = {name: outcome.tokens for name, outcome in expected.items()}
    driver = Driver(
        model("llama"),
        capabilities=capabilities("llama"),
        spec=SPECULATED,
        draft=Oracle(truths, {"long": 0.0, "short": 1.0}),
    )
    most = 0

    def watch(turn: int) -> None:
        nonlocal most
        slots = driver.engine._executor.lane.slots  # type: ignore[attr-defined]
        most = max([most, *(slot.capacity for slot in slots)])

    for one in (long, short):
        driver.submit(one)
    driver.run(watch)
    same(driver.outcomes, expected)
    assert most == 256
