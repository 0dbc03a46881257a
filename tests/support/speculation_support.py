"""Requests with and without draft tokens: who guesses, what they get, and whether it is the same."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp

import pytest
from engine_driver import Driver, Outcome
from tiny_models import VOCAB, opened, prompt, save

from millpond.model.load import LoadedModel
from millpond.model.opened import open_model
from millpond.model.probe import Capabilities
from millpond.speculate.draft import SOURCE, Draft
from millpond.speculate.proposer import DraftOffer, Proposer
from millpond.types import (
    KvPacking,
    Request,
    SamplingParams,
    SpecMode,
    SpecSettings,
    Speculation,
)

SPECULATED = SpecSettings(default=Speculation(mode=SpecMode.DRAFT, tokens=7, adaptive=False))
SAMPLED: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.1, "top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    {"temperature": 0.0, "frequency_penalty": 1.5, "logit_bias": {3: 4.0, 5: -100.0}},
]


def model(kind: str, bits: int = 0) -> LoadedModel:
    return opened(kind, KvPacking(bits=bits, group_size=32)).model


def capabilities(kind: str, bits: int = 0) -> Capabilities:
    return opened(kind, KvPacking(bits=bits, group_size=32)).capabilities


class Oracle(Proposer):
    """Knows the answers, and tells the truth with a chance of its own for every request; else it says anything."""

    def __init__(self, answers: Mapping[str, Sequence[int]], chances: Mapping[str, float], seed: int = 0) -> None:
        self._answers = answers
        self._chances = chances
        self._chooser = random.Random(seed)
        self._prompts: dict[str, int] = {}
        self.calls = 0

    def begin(self, request: Request) -> None:
        self._prompts[request.id] = len(request.tokens)

    def end(self, name: str) -> None:
        del self._prompts[name]

    def offer(self, name: str, tokens: Sequence[int], most: int, unread: int) -> DraftOffer | None:
        return DraftOffer(name, most, SOURCE)

    def propose(self, wanted: Mapping[str, int], tokens: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        self.calls += 1
        found = {}
        for name, most in wanted.items():
            done = len(tokens[name]) - self._prompts[name]
            count = self._chooser.randint(0, most)
            truth = list(self._answers.get(name, ())[done : done + count])
            truth += [self._chooser.randrange(VOCAB) for _ in range(count - len(truth))]
            chance = self._chances.get(name, 0.0)
            found[name] = [t if self._chooser.random() < chance else self._chooser.randrange(VOCAB) for t in truth]
        return found


def request(name: str, tokens: Sequence[int], most: int, /, **params: object) -> Request:
    fields = {"temperature": 0.0, **params}
    return Request(id=name, tokens=list(tokens), params=SamplingParams(max_tokens=most, **fields))  # type: ignore[arg-type]


def crowd(count: int, seed: int) -> list[Request]:
    """Requests of many lengths and ways to draw."""
    chooser = random.Random(seed)
    return [
        request(
            f"r{number}",
            prompt(chooser.randint(1, 90), seed + number),
            chooser.randint(2, 40),
            **SAMPLED[number % len(SAMPLED)],
            seed=number,
            logprobs=2 if number % 3 == 0 else None,
        )
        for number in range(count)
    ]


def plain(kind: str, requests: Sequence[Request], bits: int = 0) -> dict[str, Outcome]:
    """What they get without any drafts, each alone."""
    outcomes = {}
    for one in requests:
        driver = Driver(model(kind, bits), capabilities=capabilities(kind, bits))
        driver.submit(one)
        driver.run()
        outcomes |= driver.outcomes
    return outcomes


def same(drafted: Mapping[str, Outcome], expected: Mapping[str, Outcome]) -> None:
    for name, outcome in drafted.items():
        assert outcome.tokens == expected[name].tokens, name
        assert outcome.finish == expected[name].finish, name
        assert outcome.failure is None
        assert [one.token for one in outcome.logprobs] == [one.token for one in expected[name].logprobs]
        for ours, theirs in zip(outcome.logprobs, expected[name].logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def speculated(
    kind: str,
    requests: Sequence[Request],
    expected: Mapping[str, Outcome],
    chance: float | None,
    *,
    arrivals: Mapping[int, Request] | None = None,
    **options: object,
) -> Driver:
    """The same with an oracle that is right with that chance, or with a different one for each."""
    bits = int(options.pop("bits", 0))  # type: ignore[call-overload]
    everybody = [*requests, *(arrivals or {}).values()]
    chances = {one.id: chance if chance is not None else place / len(everybody) for place, one in enumerate(everybody)}
    oracle = Oracle({name: outcome.tokens for name, outcome in expected.items()}, chances)
    driver = Driver(
        model(kind, bits),
        capabilities=capabilities(kind, bits),
        spec=SPECULATED,
        draft=oracle,
        **options,  # type: ignore[arg-type]
    )
    for one in requests:
        driver.submit(one)
    driver.run(arrivals=arrivals)
    assert oracle.calls > 0
    return driver


def speculated_if_any(kind: str, one: Request, truth: Sequence[int]) -> Outcome:
    driver = Driver(
        model(kind), capabilities=capabilities(kind), spec=SPECULATED, draft=Oracle({one.id: truth}, {one.id: 1.0})
    )
    driver.submit(one)
    driver.run()
    return driver.outcomes[one.id]


def real_draft(kind: str, seed: int = 0, share: int = 1 << 28) -> Draft:
    """A draft model of that kind; with seed 0 the served one's twin."""
    return Draft(open_model(save(kind, Path(mkdtemp()), seed)).model, VOCAB, share, share)
