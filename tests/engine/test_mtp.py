"""A head of the model itself guesses for the whole batch: answers are those of plain decoding, steps bring as many
tokens as acceptance predicts, and what is worthless is stopped (N4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from engine_driver import Driver, Outcome, disk_cache, prefix_cache, settle
from msgspec.structs import replace
from mtp_models import HEADED, WITH_STATES, opened_headed
from speculation_support import crowd, prompt, request, same

from millpond.model.load import LoadedModel
from millpond.model.opened import OpenModel
from millpond.prefix.cache import PrefixCache
from millpond.speculate.controller import LEAST_BUDGET
from millpond.speculate.mtp import MtpProposer
from millpond.types import KvPacking, Request, SpecMode, SpecSettings, Speculation

ALWAYS = SpecSettings(default=Speculation(mode=SpecMode.MTP, tokens=3, adaptive=False))
PACKED = {
    "int8": KvPacking(bits=8, group_size=32),
    "rotated": KvPacking(bits=4, group_size=32, start=64, rotated=True),
}


def run(
    opened: OpenModel,
    requests: Sequence[Request],
    spec: SpecSettings | None,
    arrivals: dict[int, Request] | None = None,
    cache: PrefixCache | None = None,
) -> Driver:
    driver = Driver(opened.model, capabilities=opened.capabilities, spec=spec, cache=cache)
    for one in requests:
        driver.submit(one)
    driver.run(arrivals=arrivals)
    return driver


def plain(kind: str, requests: Sequence[Request], packing: KvPacking | None = None) -> dict[str, Outcome]:
    """What they get from the model without its head, each alone."""
    bare = opened_headed(kind, packing or KvPacking(), head=False)
    assert bare.model.headed is None
    found = {}
    for one in requests:
        found |= run(bare, [one], None).outcomes
    return found


@pytest.mark.often("qwen3_5", "deepseek_v3")
@pytest.mark.parametrize("kind", HEADED)
def test_a_head_changes_no_answer(kind: str) -> None:
    """One that was trained on nothing, in a batch that requests join and leave, however they are drawn."""
    requests = crowd(10, seed=1)
    expected = plain(kind, requests)
    arrivals = dict(zip((3, 7, 12, 20), requests[6:], strict=True))
    driver = run(opened_headed(kind), requests[:6], ALWAYS, arrivals)
    same(driver.outcomes, expected)
    counts = driver.beat.counters.spec
    assert counts.proposed > 200
    assert counts.accepted < counts.proposed / 3


@pytest.mark.parametrize("packing", PACKED)
def test_packed_keys_beside_a_head(packing: str) -> None:
    requests = [request(f"r{n}", prompt(40 + 13 * n, n), 25, temperature=0.7 * (n % 2), seed=n) for n in range(4)]
    expected = plain("qwen3_5", requests, PACKED[packing])
    driver = run(opened_headed("qwen3_5", PACKED[packing]), requests, ALWAYS)
    assert driver.model.form.packs
    same_answers = [driver.outcomes[name].tokens == outcome.tokens for name, outcome in expected.items()]
    assert sum(same_answers) >= 3  # a number that is half-way between two steps may fall to the other side
    assert not any(outcome.failure for outcome in driver.outcomes.values())
    assert driver.beat.counters.spec.proposed > 50


@pytest.mark.parametrize("kind", ["qwen3_next", "glm4_moe", "mimo", "deepseek_v3", "nemotron_h"])
def test_a_head_that_is_always_right(kind: str) -> None:
    """Greedy or not: every step brings all it guessed and one more."""
    requests = [request(f"r{n}", prompt(20 + n, n), 41, temperature=0.9 * (n % 2), seed=n) for n in range(4)]
    opened = opened_headed(kind, oracle=True)
    driver = run(opened, requests, ALWAYS)
    expected = {}
    for one in requests:
        expected |= run(opened, [one], None).outcomes
    same(driver.outcomes, expected)
    counts = driver.beat.counters.spec
    assert counts.accepted >= 0.97 * counts.proposed > 0  # now and then the last bits decide between two tokens
    assert counts.drawn / counts.rows > 3.5  # four, but for the ends of answers


def test_tokens_per_step_are_what_acceptance_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head that is right with a chance of p, a step of k guesses brings 1 + p + ... + p^k tokens."""
    chooser, chance = random.Random(5), 0.7
    honest = MtpProposer.propose

    def sometimes(self: MtpProposer, wanted: dict[str, int], tokens: dict[str, list[int]]) -> dict[str, list[int]]:
        found = honest(self, wanted, tokens)
        return {
            name: [token if chooser.random() < chance else (token + 1) % 256 for token in draft]
            for name, draft in found.items()
        }

    monkeypatch.setattr(MtpProposer, "propose", sometimes)
    requests = [request(f"r{n}", prompt(20 + n, n), 150, temperature=1.0, seed=n) for n in range(4)]
    driver = run(opened_headed("qwen3_5", oracle=True), requests, ALWAYS)
    counts = driver.beat.counters.spec
    predicted = sum(chance**place for place in range(4))
    assert counts.drawn / counts.rows == pytest.approx(predicted, rel=0.1)


def test_a_worthless_head_is_stopped() -> None:
    """What is lost stays within the controller's budget: most steps are plain ones."""
    spec = SpecSettings(default=Speculation(mode=SpecMode.AUTO))
    requests = [request(f"r{n}", prompt(20 + n, n), 200, temperature=1.0, seed=n) for n in range(2)]
    driver = run(opened_headed("qwen3_5"), requests, spec)
    same(driver.outcomes, plain("qwen3_5", requests))
    counts = driver.beat.counters.spec
    assert 0 < counts.steps < 40
    assert counts.fallbacks > 100
    assert driver.controller._budget >= LEAST_BUDGET


def test_a_good_head_is_found_out() -> None:
    spec = SpecSettings(default=Speculation(mode=SpecMode.AUTO))
    one = request("r", prompt(20), 200, temperature=1.0)
    driver = run(opened_headed("qwen3_5", oracle=True), [one], spec)
    counts = driver.beat.counters.spec
    assert counts.accepted > 100
    assert counts.accepted >= 0.9 * counts.proposed


def test_what_came_before_goes_ahead_of_guesses() -> None:
    """A text that repeats itself for long is not guessed by a head, whose guesses cost something."""
    opened = opened_headed("qwen3_5")
    text = prompt(30)
    driver = Driver(opened.model, capabilities=opened.capabilities, spec=ALWAYS)
    proposer = driver.speculator._proposers[SpecMode.MTP]
    one = request("r", [*text, *text[:20]], 5)
    driver.submit(one)
    driver.engine.turn()
    offer = proposer.offer("r", one.tokens, 3, 0)
    assert offer is not None
    assert list(offer.tokens) == text[20:23]
    assert offer.source.mode is SpecMode.NGRAM
    other = request("s", prompt(30, 3), 5)
    driver.submit(other)
    for _ in range(3):
        driver.engine.turn()
    guessed = proposer.offer("s", other.tokens, 3, 0)
    assert guessed is not None
    assert (guessed.source.mode, guessed.tokens) == (SpecMode.MTP, ())
    driver.run()


def test_a_request_may_do_without_its_models_head() -> None:
    opened = opened_headed("qwen3_5", oracle=True)
    requests = []
    for number, mode in enumerate((SpecMode.OFF, SpecMode.MTP, SpecMode.NGRAM)):
        whole = request(mode.value, prompt(20, number), 30, temperature=1.0)
        requests.append(replace(whole, speculation=Speculation(mode=mode, tokens=2, adaptive=False)))
    driver = run(opened, requests, ALWAYS)
    assert (driver.outcomes["off"].accepted, driver.outcomes["off"].rejected) == (0, 0)
    assert driver.outcomes["mtp"].accepted > 15
    assert driver.outcomes["mtp"].rejected == 0


def conversation(
    model: LoadedModel, opened: OpenModel, cached: PrefixCache | None, turns: int
) -> list[tuple[list[int], int, int, int]]:
    """Answers turn by turn, each prompt all that was said before: tokens, accepted and refused guesses, and how many
    tokens were restored."""
    tokens, told = prompt(140), []
    for turn in range(turns):
        driver = Driver(model, capabilities=opened.capabilities, cache=cached, spec=ALWAYS)
        driver.submit(request("t", tokens, 40, temperature=0.8, seed=turn))
        driver.run()
        outcome = driver.outcomes["t"]
        restored = outcome.prefix.cached if outcome.prefix is not None else 0
        told.append((outcome.tokens, outcome.accepted, outcome.rejected, restored))
        tokens = [*tokens, *outcome.tokens, *prompt(5, turn)]
    return told


@pytest.mark.parametrize("kind", ["qwen3_5", "glm4_moe", "nemotron_h"])
def test_a_hit_is_as_good_as_a_miss(kind: str) -> None:
    """Answers are the same; where the model has states, the guesses are, too."""
    opened = opened_headed(kind)
    cold = conversation(opened.model, opened, None, 3)
    warm = conversation(opened.model, opened, prefix_cache(opened.model), 3)
    assert [turn[0] for turn in warm] == [turn[0] for turn in cold]
    assert all(turn[3] > 100 for turn in warm[1:])
    assert not any(turn[3] for turn in cold)
    if kind in WITH_STATES:
        assert [turn[1:3] for turn in warm] == [turn[1:3] for turn in cold]


@pytest.mark.parametrize("kind", ["qwen3_5", "glm4_moe"])
def test_what_a_head_keeps_is_no_broken_memory(kind: str) -> None:
    """Blocks that are computed afresh are those that were kept, but for what a head has behind a restored prefix."""
    opened = opened_headed(kind)
    cached = prefix_cache(opened.model, selfcheck=2)
    told = conversation(opened.model, opened, cached, 5)
    assert any(turn[3] for turn in told)
    assert cached.counters.checked > 0
    assert cached.counters.mismatches == 0


def test_a_head_is_warm_after_a_restart(tmp_path: Path) -> None:
    """Blocks from the SSD have its keys, and states what it goes on from: guesses are those of an engine that has read
    everything itself."""
    opened = opened_headed("qwen3_5", oracle=False)
    text = prompt(200)
    first = request("first", text, 30, temperature=0.8, seed=3)
    outcomes = []
    for name in ("first", "second"):
        cached, ssd, inbox = disk_cache(opened.model, tmp_path)
        cached.on_event(inbox.get(timeout=30))  # type: ignore[arg-type]
        driver = Driver(opened.model, capabilities=opened.capabilities, cache=cached, ssd=ssd, inbox=inbox, spec=ALWAYS)
        driver.submit(replace(first, id=name))
        driver.run()
        outcomes.append(driver.outcomes[name])
        settle(cached, inbox)
        ssd.close(10)
    cold, warm = outcomes
    assert warm.prefix is not None
    assert warm.prefix.disk > 100
    assert warm.tokens == cold.tokens
    assert (warm.accepted, warm.rejected) == (cold.accepted, cold.rejected)
