"""Rotated keys in the engine: tiles that fill up while rows are decoded, guessed, moved, lost and restored (I3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from architectures import folders
from engine_driver import Driver, Outcome, assert_right, prefix_cache, request
from speculation_support import SPECULATED, Oracle, same
from test_packed_kinds import OWN, STATES
from tiny_models import opened, prompt

from millpond.model.assembly import Assembly
from millpond.model.blocks import BlockFormat
from millpond.model.load import LoadedModel, kept_as
from millpond.model.opened import open_model
from millpond.model.probe import Capabilities, probe
from millpond.native.packing import TILE
from millpond.types import Finish, KvPacking, Request

ROTATED = KvPacking(bits=4, group_size=32, start=TILE, rotated=True)
LENGTHS = (1, 30, 63, 64, 65, 127, 128, 129, 200)
ANSWERS = {"wide_llama": 150, "wide_qwen3": 150, "wide_gemma3_text": 12}
"""Tokens. Of windows each number is packed as it comes, and of one half-way between two steps the last bit decides."""
WAYS = ("native", "packed", "unpacked")
"""In C, with products that take packed numbers, and without."""


@cache
def model(kind: str, way: str = "native") -> LoadedModel:
    loaded = opened(kind, ROTATED).model
    return kept_as(loaded, dataclasses.replace(loaded.form, native=way == "native", unpacked=way == "unpacked"))


@cache
def capabilities(kind: str, way: str = "native") -> Capabilities:
    return probe(model(kind, way))


def driver(kind: str, way: str = "native", **options: object) -> Driver:
    return Driver(model(kind, way), capabilities=capabilities(kind, way), **options)  # type: ignore[arg-type]


def requests(kind: str, logprobs: int | None = None) -> list[Request]:
    return [request(f"r{length}", prompt(length, length), ANSWERS[kind], logprobs=logprobs) for length in LENGTHS]


def run(driven: Driver, asked: Sequence[Request]) -> dict[str, Outcome]:
    for one in asked:
        driven.submit(one)
    driven.run()
    return driven.outcomes


@cache
def alone(kind: str, way: str = "native") -> Mapping[str, Outcome]:
    """What each gets without neighbours, guesses, or a cache."""
    outcomes: dict[str, Outcome] = {}
    for one in requests(kind):
        outcomes |= run(driver(kind, way), [one])
    return outcomes


@pytest.mark.often("wide_llama-native", "wide_gemma3_text-unpacked", "wide_llama-packed")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["wide_llama", "wide_qwen3", "wide_gemma3_text"])
def test_tiles_fill_up_while_rows_are_decoded(kind: str, way: str) -> None:
    """Rows that reach the ends of tiles at different steps: each as the sequence alone that is packed at the same."""
    found = capabilities(kind, way)
    assert (found.slots, found.reason, found.native, found.unpacked) == (True, "", way == "native", way == "unpacked")
    outcomes = run(driver(kind, way), requests(kind))
    for one in requests(kind):
        assert_right(model(kind, way), one.tokens, outcomes[one.id].tokens)


@pytest.mark.parametrize("kind", ["wide_llama", "wide_gemma3_text"])
def test_a_neighbour_changes_no_bit(kind: str) -> None:
    outcomes = run(driver(kind), requests(kind, logprobs=3))
    for one in requests(kind, logprobs=3):
        assert run(driver(kind), [one])[one.id].logprobs == outcomes[one.id].logprobs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["wide_llama", "wide_gemma3_text"])
def test_a_long_prompt_beside_a_row(kind: str, way: str) -> None:
    """While it is read, rows grow for it layer by layer, and decode in between."""
    asked = [request("short", prompt(20), 60), request("long", prompt(400, 1), 5)]
    expected: dict[str, Outcome] = {}
    for one in asked:
        expected |= run(driver(kind, way), [one])
    outcomes = run(driver(kind, way, max_chunk=64), asked)
    assert not any(one.failure for one in outcomes.values())
    same(outcomes, expected)


@pytest.mark.parametrize("chance", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["wide_llama", "wide_gemma3_text"])
def test_guesses_across_the_ends_of_tiles(kind: str, chance: float) -> None:
    """Guesses end where a tile does, and what is refused in it takes nothing with it."""
    expected = alone(kind)
    truths = {name: one.tokens for name, one in expected.items()}
    driven = driver(kind, spec=SPECULATED, draft=Oracle(truths, dict.fromkeys(truths, chance)))
    outcomes = run(driven, requests(kind))
    assert sum(one.accepted for one in outcomes.values()) > len(truths) * ANSWERS[kind] // 4
    assert chance == 1.0 or sum(one.rejected for one in outcomes.values()) > 20
    same(outcomes, expected)


def test_rows_that_are_restored_are_guessed_on() -> None:
    """Computed into a cache and found there, while one goes in the middle."""
    kind, cached = "wide_llama", prefix_cache(model("wide_llama"))
    expected = alone(kind)
    truths = {name: one.tokens for name, one in expected.items()}
    chances = {name: place / len(truths) for place, name in enumerate(truths)}
    for turn in range(2):
        driven = driver(kind, cache=cached, spec=SPECULATED, draft=Oracle(truths, chances), max_batch=4)
        for one in [*requests(kind), request("gone", prompt(40, 99), 100)]:
            driven.submit(one)

        def watch(turn: int, driven: Driver = driven) -> None:
            if turn == 25:
                driven.cancel("gone")

        driven.run(watch)
        assert driven.outcomes.pop("gone").finish is Finish.CANCELLED
        same(driven.outcomes, expected)
        for one in requests(kind) if turn else ():
            found = driven.outcomes[one.id].prefix
            assert found is not None
            assert found.memory == len(one.tokens) - 1


@pytest.mark.parametrize("length", [100, 128, 129])
def test_the_same_prompt_when_its_answer_has_filled_its_block(length: int) -> None:
    """What was behind its last whole tile is kept as it was computed, beside the block that the answer filled."""
    kind, cached = "wide_llama", prefix_cache(model("wide_llama"))
    tokens = prompt(length)
    miss, hit = (run(driver(kind, cache=cached), [request("r", tokens, 90, logprobs=5)])["r"] for _ in range(2))
    assert hit.prefix is not None
    assert hit.prefix.memory == length - 1
    assert miss.logprobs == hit.logprobs
    longer = [*tokens, *miss.tokens, *prompt(9, 5)]
    next_turn = run(driver(kind, cache=cached), [request("r", longer, 5)])["r"].prefix
    assert next_turn is not None
    assert next_turn.memory == len(tokens) + len(miss.tokens) - 1


@pytest.mark.parametrize("packing", [ROTATED, KvPacking(bits=4, group_size=32, start=TILE)], ids=["rotated", "affine"])
def test_a_prompt_that_is_restored_whole_is_as_large_as_its_row(packing: KvPacking) -> None:
    """No forward reads behind it, so there are no numbers as computed, nor room for them."""
    loaded = opened("wide_llama", packing).model
    cached, tokens = prefix_cache(loaded), prompt(450)
    run(Driver(loaded, cache=cached), [request("r", tokens, 3)])
    plan = cached.plan(cached.query(tokens, ""), disk=False)
    assert plan is not None
    assert plan.position == len(tokens) - 1
    blocks, capacity = loaded.blocks, 2 * len(tokens)
    assert isinstance(blocks, BlockFormat)
    assembly = Assembly(blocks, plan.position, capacity)
    for part in plan.parts:
        assembly.put(part)
    exact = (packing.start + TILE) * loaded.sizes.exact_token_bytes
    for restored in (
        blocks.restored(loaded.network, plan, capacity, whole=True),
        assembly.finished(loaded.network, plan, whole=True),
    ):
        assert restored.nbytes <= plan.position * loaded.sizes.token_bytes + exact


def test_a_part_of_a_tile_is_of_no_use() -> None:
    """A prompt that leaves another in the middle of a block finds the whole blocks before it."""
    kind, cached = "wide_llama", prefix_cache(model("wide_llama"))
    tokens = prompt(230)
    run(driver(kind, cache=cached), [request("r", tokens, 5)])
    other = [*tokens[:150], *prompt(60, 3)]
    found = run(driver(kind, cache=cached), [request("r", other, 10)])["r"]
    assert found.prefix is not None
    assert found.prefix.memory == 128
    assert_right(model(kind), other, found.tokens, [128])


@pytest.mark.often("gpt_oss", "qwen3_5", "gemma4", "stablelm")
@pytest.mark.parametrize("name", [*OWN, *STATES])
def test_models_of_other_kinds(name: str) -> None:
    """Beside states, latents and layers that share: each row as the sequence alone; again from the prefix cache."""
    found = open_model(folders.save(name, Path(mkdtemp())), packing=ROTATED)
    cached = prefix_cache(found.model)
    for _ in range(2):
        driven = Driver(found.model, capabilities=found.capabilities, cache=cached)
        prompts = {
            str(length): [length * place % folders.VOCAB for place in range(1, length + 1)] for length in (5, 120, 150)
        }
        run(driven, [request(asked, tokens, 12) for asked, tokens in prompts.items()])
        for asked, tokens in prompts.items():
            assert_right(found.model, tokens, driven.outcomes[asked].tokens)
    assert cached.counters.hits >= len(prompts)
