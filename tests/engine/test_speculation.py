"""Draft tokens in the batch: whoever guesses, and however badly, every answer is that of plain decoding (H2-H4)."""

from __future__ import annotations

from pathlib import Path

import echo_proposer
import msgspec
import pytest
from engine_driver import PACKED_TIE, Driver, Outcome, prefix_cache
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
    speculated,
    speculated_if_any,
)
from tiny_models import HYBRID_KINDS, SLOT_KINDS

from millpond.types import Finish, Request, SamplingParams, SpecMode, SpecSettings, Speculation


@pytest.mark.often("gemma3_text", "falcon_h1")
@pytest.mark.parametrize("kind", [*SLOT_KINDS, *HYBRID_KINDS])
def test_every_answer_is_that_of_plain_decoding(kind: str) -> None:
    requests = crowd(10, seed=1)
    expected = plain(kind, requests)
    arrivals = dict(zip((3, 7, 12, 20), requests[6:], strict=True))
    for chance in (0.0, 1.0, None):
        driver = speculated(kind, requests[:6], expected, chance, arrivals=arrivals)
        same(driver.outcomes, expected)
        counts = driver.beat.counters.spec
        assert counts.proposed == sum(counts.proposed_at)
        assert counts.accepted == sum(counts.accepted_at)
        assert counts.steps > 0
        if chance == 1.0:
            assert counts.drawn / counts.rows > 2


@pytest.mark.slow
def test_with_preemption_cancels_and_cached_prefixes() -> None:
    requests = [request(f"r{n}", prompt(60 + 9 * n, n), 230, temperature=0.7, seed=n) for n in range(4)]
    expected = plain("llama", requests)
    truths = {name: outcome.tokens for name, outcome in expected.items()}
    cached = prefix_cache(model("llama"))
    tight = 1500 * model("llama").sizes.token_bytes
    for limit in (tight, 1 << 30, 1 << 30):  # computed and preempted, computed into the cache, restored from it
        driver = Driver(
            model("llama"),
            capabilities=capabilities("llama"),
            cache=cached,
            spec=SPECULATED,
            draft=Oracle(truths, {f"r{n}": n / 3 for n in range(4)}),
            limit_bytes=limit,
        )
        for one in [*requests, request("gone", prompt(40, 99), 100)]:
            driver.submit(one)

        def watch(turn: int, driver: Driver = driver, limit: int = limit) -> None:
            assert driver.beat.kv_bytes <= limit
            if turn == 25:
                driver.cancel("gone")

        driver.run(each_turn=watch)
        assert driver.outcomes.pop("gone").finish is Finish.CANCELLED
        same(driver.outcomes, expected)
        assert (driver.beat.counters.preemptions > 0) == (limit == tight)
    assert driver.outcomes["r3"].prefix is not None
    assert driver.outcomes["r3"].prefix.cached > 64


def assert_tied(one: Outcome, other: Outcome) -> None:
    """Where two greedy answers part, both hold the two tokens for equally likely."""
    ours, theirs = next(
        pair for pair in zip(one.logprobs, other.logprobs, strict=True) if pair[0].token != pair[1].token
    )
    for told in (ours, theirs):
        likely = dict(told.top)
        assert abs(likely[ours.token] - likely[theirs.token]) < PACKED_TIE


@pytest.mark.often("8-wide_gemma3_text")
@pytest.mark.parametrize("kind", ["wide_llama", "wide_gemma3_text"])
@pytest.mark.parametrize("bits", [0, 8])
def test_blocks_filled_by_bursts_are_those_of_plain_decoding(kind: str, bits: int) -> None:
    """A conversation of three turns, each restored from what the last one left, with drafts and without."""
    caches = [prefix_cache(model(kind, bits)) for _ in range(2)]
    tokens = prompt(70)
    for turn in range(3):
        one = request(f"t{turn}", tokens, 70, logprobs=2)
        outcomes: list[Outcome] = []
        for cached, drafted in zip(caches, (False, True), strict=True):
            truth = {one.id: outcomes[0].tokens} if drafted else {}
            driver = Driver(
                model(kind, bits),
                capabilities=capabilities(kind, bits),
                cache=cached,
                spec=SPECULATED if drafted else None,
                draft=Oracle(truth, {one.id: 0.8}) if drafted else None,
            )
            driver.submit(one)
            driver.run()
            outcomes.append(driver.outcomes[one.id])
        without, with_drafts = outcomes
        if bits and with_drafts.tokens != without.tokens:
            assert_tied(without, with_drafts)
            return  # a number that is half-way between two steps fell to the other side, and the conversations differ
        assert with_drafts.tokens == without.tokens
        assert [one.logprob for one in with_drafts.logprobs] == pytest.approx(
            [one.logprob for one in without.logprobs], abs=PACKED_TIE if bits else 1e-4
        )
        assert with_drafts.prefix == without.prefix
        assert with_drafts.accepted > 20
        assert turn == 0 or (without.prefix is not None and without.prefix.cached >= len(tokens) - 64)
        tokens = [*tokens, *without.tokens, *prompt(5, turn)]


def test_endings_in_the_middle_of_a_run() -> None:
    tokens = prompt(30)
    whole = plain("llama", [request("r", tokens, 40)])["r"].tokens
    for stop_at in range(1, 20):
        ends = whole[stop_at]
        if ends in whole[:stop_at]:
            continue
        one = request("r", tokens, 40, stop_token_ids=[ends], logprobs=0)
        outcome = speculated("llama", [one], {"r": plain("llama", [request("r", tokens, 40)])["r"]}, 1.0).outcomes["r"]
        assert (outcome.tokens, outcome.finish) == (whole[:stop_at], Finish.STOP)
        assert len(outcome.logprobs) == stop_at
        assert outcome.accepted <= stop_at
    for most in range(1, 12):
        outcome = speculated_if_any("llama", request("r", tokens, most), whole)
        assert (outcome.tokens, outcome.finish) == (whole[:most], Finish.LENGTH)


def test_context_and_memory_that_end() -> None:
    """Draft tokens never reach past the context, nor past the memory that is there."""
    held: list[int] = []
    context = model("llama").context_length
    tokens = prompt(context - 9)
    one = request("r", tokens, 9)
    whole = plain("llama", [one])["r"].tokens
    assert speculated_if_any("llama", one, whole).tokens == whole
    limit = 512 * model("llama").sizes.token_bytes + 4096
    near = request("r", prompt(230), 24)
    truth = plain("llama", [near])["r"].tokens
    driver = Driver(
        model("llama"),
        capabilities=capabilities("llama"),
        spec=SPECULATED,
        draft=Oracle({"r": truth}, {"r": 1.0}),
        limit_bytes=limit * 2,
    )
    driver.submit(near)
    driver.run(each_turn=lambda _: held.append(driver.beat.kv_bytes) or None)  # type: ignore[func-returns-value]
    assert driver.outcomes["r"].tokens == truth
    assert max(held) <= limit * 2


def test_models_in_the_solo_lane_do_without() -> None:
    one = request("r", prompt(20), 12)
    expected = plain("mamba", [one])
    driver = Driver(model("mamba"), capabilities=capabilities("mamba"), spec=SPECULATED)
    driver.submit(one)
    driver.run()
    same(driver.outcomes, expected)
    assert driver.beat.counters.spec.steps == 0


@pytest.mark.often("qwen3")
@pytest.mark.parametrize(("drafting", "seed"), [("llama", 0), ("qwen3", 3), ("gemma3_text", 1)])
def test_a_draft_model_beside_the_served_one(drafting: str, seed: int) -> None:
    """Twins agree always, strangers hardly ever; requests come and go, and every answer is the plain one."""
    requests = crowd(9, seed=4)
    expected = plain("llama", requests)
    draft = real_draft(drafting, seed)
    driver = Driver(model("llama"), capabilities=capabilities("llama"), spec=SPECULATED, draft=draft)
    for one in requests[:5]:
        driver.submit(one)
    gone = request("gone", prompt(33, 5), 60)
    driver.submit(gone)

    def watch(turn: int) -> None:
        if turn == 12:
            driver.cancel("gone")

    driver.run(watch, arrivals=dict(zip((4, 9, 15, 22), requests[5:], strict=True)))
    driver.outcomes.pop("gone")
    same(driver.outcomes, expected)
    counts = driver.beat.counters.spec
    assert counts.steps > 0
    if seed == 0:  # penalties are the served model's alone
        bare = [name for name, one in zip(expected, requests, strict=True) if not one.params.needs_history]
        assert all(driver.outcomes[name].rejected == 0 for name in bare)
        assert sum(driver.outcomes[name].accepted for name in bare) > 30
    else:
        assert counts.accepted < counts.proposed / 3


def test_the_proposer_of_the_recipe_changes_no_answer() -> None:
    code = Path(echo_proposer.__file__).read_text().replace("SpecMode.DRAFT", "SpecMode.ECHO")
    recipe = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-proposer.md"
    assert code in recipe.read_text().replace("\n   ", "\n")
    requests = crowd(6, seed=3)
    driver = Driver(
        model("llama"), capabilities=capabilities("llama"), spec=SPECULATED, draft=echo_proposer.EchoProposer()
    )
    for one in requests:
        driver.submit(one)
    driver.run()
    same(driver.outcomes, plain("llama", requests))
    assert driver.beat.counters.spec.proposed > 0


def test_lookup_and_controller_as_they_are() -> None:
    """What the client predicts, and what was answered before, is guessed; the answers are the same."""
    spec = SpecSettings(default=Speculation(mode=SpecMode.NGRAM), shared=True)
    requests = [request(f"r{n}", prompt(12 + n, n), 100) for n in range(4)]
    expected = plain("llama", requests)
    driver = Driver(model("llama"), capabilities=capabilities("llama"), spec=spec)
    for turn, name in enumerate(("first", "again")):
        for one in requests:
            prediction = expected[one.id].tokens if turn == 0 else []
            driver.submit(msgspec.structs.replace(one, id=f"{name} {one.id}", prediction=prediction))
        driver.run()
        for one in requests:
            outcome = driver.outcomes[f"{name} {one.id}"]
            assert outcome.tokens == expected[one.id].tokens
            assert outcome.accepted > 50
    other = msgspec.structs.replace(requests[0], id="other", cache_salt="somebody else")
    driver.submit(other)
    driver.run()
    assert driver.outcomes["other"].tokens == expected["r0"].tokens
    assert driver.outcomes["other"].accepted < 10


def test_a_request_chooses_for_itself() -> None:
    truth = plain("llama", [request("r", prompt(20), 30)])["r"].tokens
    off = Request(
        id="off",
        tokens=prompt(20),
        params=SamplingParams(max_tokens=30, temperature=0.0),
        speculation=Speculation(mode=SpecMode.OFF),
    )
    few = msgspec.structs.replace(off, id="few", speculation=Speculation(mode=SpecMode.DRAFT, tokens=2, adaptive=False))
    oracle = Oracle({"few": truth, "off": truth}, {"few": 1.0, "off": 1.0})
    driver = Driver(model("llama"), capabilities=capabilities("llama"), spec=SPECULATED, draft=oracle)
    for one in (off, few):
        driver.submit(one)
    driver.run()
    assert driver.outcomes["off"].tokens == driver.outcomes["few"].tokens == truth
    assert (driver.outcomes["off"].accepted, driver.outcomes["off"].rejected) == (0, 0)
    assert driver.outcomes["few"].accepted > 10
    assert len(driver.beat.counters.spec.proposed_at) == 2
