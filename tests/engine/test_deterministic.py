"""(D4) The same answer whatever the load, where a device rounds in other ways for other numbers of rows."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from engine_driver import Driver, Outcome, disk_cache, prefix_cache, request, settle
from gpu_lane import as_on_a_gpu, rounding_by_rows, save_as
from tiny_models import VOCAB, save

from millpond.engine.steady import steadied
from millpond.model import attention, rounding
from millpond.model.forwards import decode, prefill, prefill_together
from millpond.model.lanes import SlotsLane
from millpond.model.load import ModelError
from millpond.model.opened import OpenModel, open_model
from millpond.model.prompt import new_prompt
from millpond.model.rounding import alike
from millpond.types import KvPacking

KINDS = (("llama", "q4"), ("qwen3", "bf16"), ("gemma3_text", "bf16"))
ROWS = 6
CHUNK = 128
"""More than a block: the last one of a prompt may hold whole blocks, too."""
ANSWER = 24
LENGTHS = (5, 63, 70, 150, 200, 260)


@pytest.fixture(params=KINDS, ids="-".join)
def opened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OpenModel:
    folder = save_as(*request.param, tmp_path / "model")
    as_on_a_gpu(monkeypatch)
    rounding_by_rows(monkeypatch)
    return open_model(folder)


@pytest.fixture
def steady(opened: OpenModel) -> OpenModel:
    return steadied(opened, ROWS, CHUNK, 1)[0]


def prompts(seed: int = 5) -> dict[str, list[int]]:
    chooser = random.Random(seed)
    return {f"r{length}": [chooser.randrange(VOCAB) for _ in range(length)] for length in LENGTHS}


def answered(
    opened: OpenModel, wanted: dict[str, list[int]], answer: int = ANSWER, **options: object
) -> dict[str, Outcome]:
    """All at once; every other one is drawn, the rest is greedy."""
    driver = Driver(opened.model, capabilities=opened.capabilities, max_batch=ROWS, **options)  # type: ignore[arg-type]
    for number, (name, tokens) in enumerate(wanted.items()):
        seeded = {"temperature": 0.8, "seed": 7} if number_of(name) % 2 else {}
        driver.submit(request(name, tokens, answer + 3 * number, logprobs=3, **seeded))
    driver.run()
    assert not [outcome.failure for outcome in driver.outcomes.values() if outcome.failure]
    return driver.outcomes


def number_of(name: str) -> int:
    return LENGTHS.index(int(name[1:]))


def seen(outcome: Outcome) -> list[object]:
    """What must not depend on anything else, down to the last bit."""
    return [(entry.token, entry.logprob, entry.top) for entry in outcome.logprobs[:ANSWER]]


def assert_equal(ones: dict[str, Outcome], others: dict[str, Outcome]) -> None:
    for name in ones.keys() & others.keys():
        assert seen(ones[name]) == seen(others[name]), name


def alone(opened: OpenModel, wanted: dict[str, list[int]], **options: object) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for name, tokens in wanted.items():
        found |= answered(opened, {name: tokens}, **options)
    return found


@pytest.mark.often("qwen3")
def test_usually_the_load_shows(opened: OpenModel) -> None:
    """Otherwise nothing here would show anything."""
    crowd, single = answered(opened, prompts()), alone(opened, prompts())
    assert any(seen(crowd[name]) != seen(single[name]) for name in crowd)
    assert len(opened.capabilities.alike) > 1


@pytest.mark.often("llama")
def test_answers_are_the_same_whatever_the_load(steady: OpenModel) -> None:
    expected = alone(steady, prompts(), steady=CHUNK)
    assert_equal(answered(steady, prompts(), steady=CHUNK), expected)
    backwards = dict(reversed(prompts().items()))
    assert_equal(answered(steady, backwards, steady=CHUNK, max_chunk=2 * CHUNK), expected)
    two = {name: prompts()[name] for name in ("r63", "r200")}
    assert_equal(answered(steady, two, steady=CHUNK), expected)


@pytest.mark.often("llama")
def test_a_hit_is_a_miss_down_to_the_last_bit(steady: OpenModel, tmp_path: Path) -> None:
    """From memory, from the SSD, and behind another prompt that begins alike."""
    wanted = prompts()
    wanted["r260"] = [*wanted["r200"], *wanted["r260"][200:]]
    expected = alone(steady, wanted, steady=CHUNK)
    cache, ssd, inbox = disk_cache(steady.model, tmp_path / "ssd")
    longest = wanted[f"r{LENGTHS[-1]}"]
    wanted["r150"] = [*longest[:140], *wanted["r150"][140:]]
    expected |= alone(steady, {"r150": wanted["r150"]}, steady=CHUNK)
    for _ in range(2):
        found = answered(steady, wanted, steady=CHUNK, cache=cache, ssd=ssd, inbox=inbox)
        assert_equal(found, expected)
    again = found[f"r{LENGTHS[-1]}"].prefix
    assert again is not None
    assert again.memory == (LENGTHS[-1] - 1) // CHUNK * CHUNK
    settle(cache, inbox)
    ssd.close(30)
    cache, ssd, inbox = disk_cache(steady.model, tmp_path / "ssd")
    found = answered(steady, wanted, steady=CHUNK, cache=cache, ssd=ssd, inbox=inbox)
    ssd.close(30)
    assert_equal(found, expected)
    read = found[f"r{LENGTHS[-1]}"].prefix
    assert read is not None
    assert read.disk == again.memory


@pytest.mark.often("qwen3")
def test_an_answer_goes_on_in_the_next_prompt(steady: OpenModel) -> None:
    """What was drawn is read again, because reading it rounds in another way. Answers that fill a chunk, too."""
    wanted, cache = prompts(), prefix_cache(steady.model)
    first = answered(steady, wanted, 80, steady=CHUNK, cache=cache)
    assert any(len(wanted[name]) // CHUNK < (len(wanted[name]) + 80) // CHUNK for name in wanted)
    longer = {name: [*tokens, *first[name].tokens, 3, 4, 5] for name, tokens in wanted.items()}
    longer = {name: tokens for name, tokens in longer.items() if len(tokens) > 64}
    assert_equal(answered(steady, longer, steady=CHUNK, cache=cache), alone(steady, longer, steady=CHUNK))


@pytest.mark.slow
def test_nobody_is_preempted(steady: OpenModel) -> None:
    """Rows are promised what they can come to need: where memory is short, requests wait instead."""
    sizes = steady.model.sizes
    limit = 1500 * sizes.token_bytes + 3 * sizes.row_bytes
    driver = Driver(
        steady.model, capabilities=steady.capabilities, max_batch=ROWS, limit_bytes=limit, max_chunk=CHUNK, steady=CHUNK
    )
    for name, tokens in prompts().items():
        driver.submit(request(name, tokens[:70], 230))
    driver.run()
    assert not [outcome.failure for outcome in driver.outcomes.values() if outcome.failure]
    assert driver.beat.counters.preemptions == 0


@pytest.mark.often("llama")
@pytest.mark.parametrize("together", [False, True])
def test_a_neighbours_content_changes_nothing(together: bool, opened: OpenModel) -> None:
    """As usual, not only where answers are deterministic: at equal shapes, rows get equal bits."""
    model, lengths = opened.model, (33, 63, 150)
    found: list[list[mx.array]] = []
    for seed in (1, 2):
        chooser = random.Random(seed)
        rows = [[chooser.randrange(VOCAB) for _ in range(length)] for length in lengths]
        rows[1] = prompts()["r63"]
        read = [new_prompt(model.network, model.form) for _ in rows]
        if together:
            prefill_together(model.network, read, rows)
        lane = model.slots_lane()
        for number, (prompt, tokens) in enumerate(zip(read, rows, strict=True)):
            if not together:
                prefill(model.network, prompt, tokens)
            lane.adopt(str(number), prompt)
        found.append([])
        for step in range(4):
            newest = [chooser.randrange(VOCAB), step, chooser.randrange(VOCAB)]
            found[-1].append(decode(model.network, lane, mx.array(newest, dtype=mx.int32))[1])
            mx.eval(found[-1])
    for one, other in zip(*found, strict=True):
        assert mx.array_equal(one, other)


def test_packed_keys_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save_as("wide_llama", "bf16", tmp_path / "model")
    as_on_a_gpu(monkeypatch)
    opened = open_model(folder, packing=KvPacking(bits=8, group_size=64))
    assert opened.capabilities.slots
    with pytest.raises(ModelError, match="deterministic: not with kv_bits: 8: "):
        steadied(opened, ROWS, CHUNK, 1)


def test_a_promise_that_cannot_be_kept_is_not_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a row's numbers depend on its neighbours in ways that nobody here knows of."""
    opened = open_model(save_as("llama", "bf16", tmp_path / "model"))
    norm = mx.fast.rms_norm

    def leaking(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return norm(x, weight, eps) + 1e-3 * x[-1:].mean()

    monkeypatch.setattr(mx.fast, "rms_norm", leaking)
    with pytest.raises(ModelError, match="depends on the 1 beside it even where all forwards are alike"):
        steadied(opened, ROWS, CHUNK, 1)


@pytest.mark.parametrize("spoil", ["rows", "nobody"])
def test_numbers_of_rows_that_round_alike(spoil: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save_as("llama", "bf16", tmp_path / "model")
    as_on_a_gpu(monkeypatch)
    if spoil == "rows":
        rounding_by_rows(monkeypatch)
    groups = alike(open_model(folder).model, range(1, 9))
    assert sorted(rows for group in groups for rows in group) == list(range(1, 9))
    if spoil == "rows":
        assert [1, 6] in groups
        assert len(groups) == 5


def test_a_model_whose_attention_is_its_own_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where rows that attend on their own would be answered wrongly, if always in the same way."""
    opened = open_model(save_as("llama", "bf16", tmp_path / "model"))
    as_on_a_gpu(monkeypatch)
    opened = open_model(tmp_path / "model")
    apart = attention.row_by_row
    monkeypatch.setattr(attention, "row_by_row", lambda *given: 2 * apart(*given))
    with pytest.raises(ModelError, match="rows that attend on their own get other numbers than usual"):
        steadied(opened, ROWS, CHUNK, 1)


def test_on_a_cpu(tmp_path: Path) -> None:
    """With the C part, whose products and attention are its own."""
    save("llama", tmp_path)
    plain = open_model(tmp_path)
    steady, told = steadied(plain, ROWS, CHUNK, 1)
    assert str(ROWS) in told
    assert_equal(answered(steady, prompts(), steady=CHUNK), alone(steady, prompts(), steady=CHUNK))


@pytest.mark.often("llama")
def test_ranks_run_the_same_forwards_whatever_they_find(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """They compute together: one that stops early, or fills forwards up to other numbers, would hold up the others."""
    run: list[tuple[int, int]] = []
    forward = SlotsLane.forward

    def noted(lane: SlotsLane, network: nn.Module, tokens: mx.array) -> mx.array:
        logits = forward(lane, network, tokens)
        run.append((tokens.shape[0], 0 if lane._forward is None else lane._forward.rows))
        return logits

    monkeypatch.setattr(SlotsLane, "forward", noted)
    found = []
    for same in (True, False):
        for near in (True, False):
            monkeypatch.setattr(rounding, "same", lambda *_, same=same: same)
            monkeypatch.setattr(rounding, "_near", lambda *_, near=near: near)
            run.clear()
            found.append((rounding.steady_rows(opened.model, ROWS, world=2), tuple(run)))
    assert [isinstance(verdict, str) for verdict, _ in found] == [False, True, True, True]
    assert found[0][0] == (ROWS,)
    assert len({forwards for _, forwards in found}) == 1
