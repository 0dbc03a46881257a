"""Rows of models with several kinds of layers where something happens to them: they lose their places, forwards fail,
numbers are not finite (N2, N3, D6, D7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import folders
from engine_driver import Driver, Outcome, prefix_cache
from mlx.utils import tree_unflatten
from speculation_support import SPECULATED, Oracle, crowd, prompt, real_draft, request, same
from tiny_models import VOCAB

from millpond.engine.inflight import InflightStep, Steps
from millpond.memory.budget import MemoryBudget
from millpond.model.load import load
from millpond.model.opened import OpenModel, open_model
from millpond.types import Finish, Request

KINDS = ("qwen3_5", "lfm2", "nemotron_h", "kimi_linear", "falcon_h1", "deepseek_v32")


@cache
def opened(kind: str) -> OpenModel:
    return open_model(saved(kind))


@cache
def saved(kind: str) -> Path:
    """Once: some of its weights are what the model's class draws."""
    return folders.save(kind, Path(mkdtemp()), folders.with_vocabulary(folders.config_of(kind), VOCAB))


def driver(kind: str, network: object = None, **options: object) -> Driver:
    found = opened(kind)
    model = found.model if network is None else dataclasses.replace(found.model, network=network)  # type: ignore[arg-type]
    return Driver(model, capabilities=found.capabilities, **options)  # type: ignore[arg-type]


def plain(kind: str, requests: Sequence[Request]) -> dict[str, Outcome]:
    """What they get without any drafts, each alone."""
    outcomes = {}
    for one in requests:
        driven = driver(kind)
        driven.submit(one)
        driven.run()
        outcomes |= driven.outcomes
    return outcomes


def knowing(expected: Mapping[str, Outcome], chances: Mapping[str, float] | None = None) -> Oracle:
    """By default one that is always right."""
    return Oracle({name: outcome.tokens for name, outcome in expected.items()}, chances or dict.fromkeys(expected, 1.0))


@pytest.mark.often("falcon_h1")
@pytest.mark.parametrize("kind", KINDS)
def test_places_are_lost_while_there_are_guesses(kind: str) -> None:
    """Computed while memory is short, computed into the cache, and restored from it; one is cancelled."""
    requests = [request(f"r{n}", prompt(60 + 9 * n, n), 230) for n in range(4)]
    expected = plain(kind, requests)
    model = opened(kind).model
    cached = prefix_cache(model)
    budget = MemoryBudget(model.sizes, 1 << 30)
    least = max(budget.alone_bytes(len(requests[-1].tokens) + 230), budget.arena_bytes(3, 256))
    preemptions = 0
    # How many places there are depends on the sizes of a row: one of the first makes somebody give way.
    for limit in (least * 51 // 50, least * 6 // 5, least * 3 // 2, 1 << 30, 1 << 30):
        chances = {one.id: place / len(requests) for place, one in enumerate(requests)}
        driven = driver(kind, cache=cached, spec=SPECULATED, draft=knowing(expected, chances), limit_bytes=limit)
        for one in [*requests, request("gone", prompt(40, 99), 100)]:
            driven.submit(one)

        def watch(turn: int, driven: Driver = driven, limit: int = limit) -> None:
            assert driven.beat.kv_bytes <= limit
            if turn == 25:
                driven.cancel("gone")

        driven.run(watch)
        assert driven.outcomes.pop("gone").finish is Finish.CANCELLED
        same(driven.outcomes, expected)
        preemptions += driven.beat.counters.preemptions
    assert preemptions > 0
    assert driven.outcomes["r3"].prefix is not None
    assert driven.outcomes["r3"].prefix.memory > 0


class FailsOnce:
    """A network that raises behind its last layer, when every layer has got what it was given, while it is armed."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.armed = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._network, name)

    def __call__(self, tokens: mx.array, cache: object) -> mx.array:
        logits: mx.array = self._network(tokens, cache=cache)
        if self.armed:
            self.armed = False
            raise RuntimeError("no memory for so many columns, say")
        return logits


@pytest.mark.often("lfm2")
@pytest.mark.parametrize("step", ["plain", "verifying"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_fails_when_all_layers_have_written(
    kind: str, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is left in any row."""
    requests = [request(f"r{n}", prompt(20 + n, n), 40) for n in range(3)]
    expected = plain(kind, requests)
    failing = FailsOnce(opened(kind).model.network)
    drafts = (
        {"spec": SPECULATED, "draft": knowing(expected, dict.fromkeys(expected, 0.5))} if step == "verifying" else {}
    )
    driven = driver(kind, failing, **drafts)
    build, built = getattr(Steps, step), 0

    def arming(steps: Steps, *args: object, **named: object) -> InflightStep:
        nonlocal built
        built += 1
        failing.armed = built == 2
        found: InflightStep = build(steps, *args, **named)
        return found

    monkeypatch.setattr(Steps, step, arming)
    for one in requests:
        driven.submit(one)
    driven.run()
    same(driven.outcomes, expected)
    assert built >= 2
    assert driven.beat.counters.failed_steps == 1


class Poisonous(nn.Embedding):
    """Of one token it makes numbers that are none."""

    def __init__(self, inner: nn.Embedding, token: int) -> None:
        super().__init__(1, 1)
        self.weight = inner.weight
        self._token = token

    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.where((tokens == self._token)[..., None], mx.nan, super().__call__(tokens))


def poisoned(kind: str, token: int) -> nn.Module:
    network = load(saved(kind), 0, lambda _done: None).network
    ((path, inner),) = [(path, each) for path, each in network.named_modules() if isinstance(each, nn.Embedding)]
    network.update_modules(tree_unflatten([(path, Poisonous(inner, token))]))
    return network


@pytest.mark.often("qwen3_5")
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_behind_a_draft_harm_nobody(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding would never have fed that token. Whoever gets the rows next finds them clean."""
    requests = [request(f"r{n}", prompt(20 + n, n), 24) for n in range(3)]
    late = request("late", prompt(15, 77), 30)
    expected = plain(kind, [*requests, late])
    drawn = {token for one in [*requests, late] for token in (*one.tokens, *expected[one.id].tokens)}
    poison = next(token for token in range(VOCAB) if token not in drawn)
    oracle = knowing(expected)
    propose, armed = oracle.propose, False

    def poisoning(wanted: Mapping[str, int], tokens: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        nonlocal armed
        found = propose(wanted, tokens)
        if not armed and {"r0", "r2"} <= set(found):
            armed = True
            found |= {name: [poison, 3, 3, 3] for name in ("r0", "r2")}
        return found

    monkeypatch.setattr(oracle, "propose", poisoning)
    driven = driver(kind, poisoned(kind, poison), spec=SPECULATED, draft=oracle)
    for one in requests:
        driven.submit(one)
    submitted = False

    def watch(_turn: int) -> None:
        nonlocal submitted
        if armed and not submitted:
            submitted = True
            driven.submit(late)

    driven.run(watch)
    assert submitted
    same(driven.outcomes, expected)


@pytest.mark.often("falcon_h1")
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_model_of_another_kind_beside_it(kind: str) -> None:
    """What is noted of a layer is of the served model's, whatever another model does between two steps."""
    requests = crowd(6, seed=4)
    expected = plain(kind, requests)
    driven = driver(kind, spec=SPECULATED, draft=real_draft("llama"))
    for one in requests[:2]:
        driven.submit(one)
    driven.run(arrivals=dict(zip((4, 9, 15, 22), requests[2:], strict=True)))
    same(driven.outcomes, expected)
    assert driven.beat.counters.spec.steps > 0
