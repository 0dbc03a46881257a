"""Several prompts in one forward: each answers as if it had been read alone, and one that fails fails alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from engine_driver import Driver, assert_right, assert_same_or_tied, prefix_cache, reference, request
from gpu_lane import as_on_a_gpu, assert_same_or_near, save_as
from tiny_models import CONFIGS_WIDE, SLOT_KINDS, STATE_KINDS, VOCAB, capabilities, model, opened, prompt

from millpond.engine import executor
from millpond.engine.recovery import MOST_COMMON_FAILURES
from millpond.model.opened import OpenModel, open_model
from millpond.model.prompt import Prompt
from millpond.schedule.costs import CostModel
from millpond.types import KvPacking

ANSWER = 12
MANY, TOKENS = 8, 100


def as_of_a_gpu(costs: CostModel) -> None:
    """Reading the weights is nearly all that a prompt costs."""
    for tokens in (16, 64, 128, 256) * 3:
        costs.observe_prefill(0, tokens, 10.0 + tokens / 1000)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each forward has read."""
    seen: list[int] = []
    alone, together = executor.prefill, executor.prefill_together

    def counting(network: nn.Module, one: Prompt, tokens: Sequence[int]) -> None:
        if tokens:
            seen.append(1)
        alone(network, one, tokens)

    def counting_together(network: nn.Module, prompts: Sequence[Prompt], chunks: Sequence[Sequence[int]]) -> None:
        seen.append(len(prompts))
        together(network, prompts, chunks)

    monkeypatch.setattr(executor, "prefill", counting)
    monkeypatch.setattr(executor, "prefill_together", counting_together)
    return seen


def driver(served: OpenModel, **options: object) -> Driver:
    made = Driver(served.model, capabilities=served.capabilities, max_chunk=2048, **options)  # type: ignore[arg-type]
    as_of_a_gpu(made.scheduler._costs)
    return made


def answered(driven: Driver, prompts: dict[str, list[int]], most: int = ANSWER) -> dict[str, list[int]]:
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, most))
    driven.run()
    assert not [outcome.failure for outcome in driven.outcomes.values() if outcome.failure]
    return {name: outcome.tokens for name, outcome in driven.outcomes.items()}


@pytest.mark.often("bf16")
@pytest.mark.parametrize("stored", ["bf16", "q4"])
def test_eight_prompts_at_once_on_a_gpu(
    stored: str, reads: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_as("llama", stored, tmp_path)
    as_on_a_gpu(monkeypatch)
    served = open_model(folder)
    prompts = {f"p{n}": prompt(TOKENS, n) for n in range(MANY)}
    together = answered(driver(served), prompts)
    assert len(reads) <= 3, reads
    assert sum(reads) == 2 * MANY, "a block and a tail of each"
    for name, tokens in prompts.items():
        reads.clear()
        alone = answered(driver(served), {name: tokens})
        assert reads == [1, 1]
        assert_same_or_near(served.model.network, tokens, together[name], alone[name])


@pytest.mark.often("wide_gemma3_text", "qwen3", "llama")
@pytest.mark.parametrize("kind", [*SLOT_KINDS, *CONFIGS_WIDE])
def test_prompts_of_different_lengths_behind_different_prefixes(kind: str, reads: list[int]) -> None:
    """Beginnings from the cache, windows that have moved on, tails of any length: as mlx-lm answers each."""
    packing = KvPacking(bits=8, group_size=64) if kind in CONFIGS_WIDE else KvPacking()
    served = opened(kind, packing)
    assert served.capabilities.together
    cache = prefix_cache(served.model)
    first = {f"p{n}": prompt(length, n) for n, length in enumerate((3, 30, 65, 66, 70, 130, 200))}
    answered(driver(served, cache=cache), first)
    assert max(reads) > 4
    reads.clear()
    longer = {name: [*tokens, *prompt(20 + 9 * n, 50 + n)] for n, (name, tokens) in enumerate(first.items())}
    second = driver(served, cache=cache)
    found = answered(second, longer)
    assert max(reads) > 4
    assert second.outcomes["p6"].prefix is not None
    assert second.outcomes["p6"].prefix.cached >= 192
    for name, tokens in longer.items():
        report = second.outcomes[name].prefix
        assert report is not None
        assert_right(served.model, tokens, found[name], [report.cached] if report.cached else [])


class Picky:
    """A model that raises when it reads a token that it does not like, or too many prompts at once."""

    def __init__(self, network: nn.Module, hated: int, most: int) -> None:
        self.network, self.hated, self.most = network, hated, most

    def __getattr__(self, name: str) -> object:
        return getattr(self.network, name)

    def __call__(self, tokens: mx.array, cache: list[object]) -> mx.array:
        if tokens.shape[1] > 1 and (self.hated in tokens.flatten().tolist() or tokens.shape[0] > self.most):
            raise RuntimeError("not this one")
        logits: mx.array = self.network(tokens, cache=cache)
        return logits


def picky(kind: str, hated: int, most: int = 1 << 30) -> OpenModel:
    served = opened(kind)
    network = Picky(served.model.network, hated, most)
    return dataclasses.replace(served, model=dataclasses.replace(served.model, network=network))  # type: ignore[arg-type]


@pytest.mark.parametrize("place", [20, 80])
def test_one_that_fails_fails_alone(place: int, reads: list[int]) -> None:
    """Nobody knows whose fault a common forward was: all are read again, each alone, and the others answer. In its
    first chunk or when something of all has been read."""
    hated = 7
    prompts = {f"p{n}": [token for token in prompt(TOKENS, n) if token != hated] for n in range(6)}
    prompts["bad"] = [*prompts["p0"][:place], hated, *prompts["p1"][: TOKENS - 5 - place]]
    driven = driver(picky("llama", hated))
    for name, tokens in prompts.items():
        driven.submit(request(name, tokens, ANSWER))
    driven.run()
    assert driven.outcomes["bad"].failure is not None
    assert max(reads) == len(prompts), "they were read together at first"
    network = model("llama").network
    for name, tokens in prompts.items():
        if name != "bad":
            assert driven.outcomes[name].failure is None
            expected = reference(network, tokens, ANSWER)
            assert_same_or_tied(network, tokens, driven.outcomes[name].tokens, expected)


def test_what_cannot_be_read_together_is_read_apart(reads: list[int]) -> None:
    """A forward over several prompts that always fails costs nobody an answer."""
    prompts = {f"p{n}": prompt(TOKENS, n) for n in range(4)}
    found = answered(driver(picky("llama", VOCAB, most=1)), prompts)
    network = model("llama").network
    for name, tokens in prompts.items():
        assert_same_or_tied(network, tokens, found[name], reference(network, tokens, ANSWER))
    assert reads.count(4) == 1


def test_common_forwards_that_keep_failing_are_given_up(reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    driven = driver(picky("llama", VOCAB, most=1))
    # What this machine takes is another matter.
    monkeypatch.setattr(driven.scheduler._costs, "observe_prefill", lambda *_: None)
    for wave in range(MOST_COMMON_FAILURES + 2):
        answered(driven, {f"w{wave} p{n}": prompt(TOKENS, 10 * wave + n) for n in range(3)}, 2)
    assert sum(count > 1 for count in reads) == MOST_COMMON_FAILURES


@pytest.mark.parametrize("kind", STATE_KINDS)
def test_recurrent_layers_read_alone(kind: str) -> None:
    assert not capabilities(kind).together


def test_reading_apart_where_nothing_is_saved(reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which a prompt's tokens are what reading it costs."""
    driven = Driver(model("llama"), capabilities=capabilities("llama"))
    costs = driven.scheduler._costs
    for tokens in (16, 64, 128, 256) * 3:
        costs.observe_prefill(0, tokens, 3.0 * tokens)
    monkeypatch.setattr(costs, "observe_prefill", lambda *_: None)  # what this machine takes is another matter
    answered(driven, {f"p{n}": prompt(TOKENS, n) for n in range(4)})
    assert set(reads) == {1}
