"""SmolLM2 on three ranks, one for each of its heads of keys and values, answers what one rank answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from engine_driver import FLIPPED, PACKED_TIE, TIE, Outcome, request
from group_driver import Group
from msgspec.structs import replace

from millpond.settings import PrefixSettings, SavePolicy
from millpond.types import KvPacking, Request, SpecMode, Speculation

ANSWER = 6
PROMPTS = [list(range(1000 + index, 1040 + 9 * index)) for index in range(4)]

pytestmark = pytest.mark.models


def batch(tag: str, **changed: object) -> list[Request]:
    asked = [request(f"{tag}{index}", tokens, ANSWER, logprobs=5) for index, tokens in enumerate(PROMPTS)]
    return [replace(each, **changed) for each in asked]


def guided(answers: Sequence[Outcome]) -> list[Request]:
    """With what will be answered as a prediction, but for its last token."""
    forced = Speculation(mode=SpecMode.NGRAM, adaptive=False)
    return [
        replace(asked, prediction=[*asked.tokens[-2:], *answer.tokens[:-1], 0], speculation=forced)
        for asked, answer in zip(batch("guided"), answers, strict=True)
    ]


def assert_same(ours: Sequence[Outcome], theirs: Sequence[Outcome], tie: float) -> None:
    """Token for token; where two part, both say that the two tokens are a near-tie, and it hardly ever happens."""
    parted = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine.tokens) == len(other.tokens) == ANSWER
        for drawn, expected in zip(mine.logprobs, other.logprobs, strict=True):
            if drawn.token != expected.token:
                for told in (drawn, expected):
                    likely = dict(told.top)
                    assert abs(likely[drawn.token] - likely[expected.token]) < tie
                parted += 1
                break
            assert drawn.logprob == pytest.approx(expected.logprob, abs=FLIPPED)
    assert parted < len(PROMPTS) // 2


def restored(outcomes: Sequence[Outcome]) -> list[int]:
    return [outcome.prefix.cached if outcome.prefix is not None else -1 for outcome in outcomes]


@pytest.mark.slow  # a small model does all of this in test_group_answers
def test_cold_cached_guessed_and_after_a_restart(smollm2_folder: Path, tmp_path: Path) -> None:
    with Group(smollm2_folder, 1, tmp_path / "alone") as group:
        group.ready()
        one = list(group.answers(batch("one")).values())
        group.stop()
    settings = PrefixSettings(cache_ssd=1 << 30, ssd_policy=SavePolicy.ALL)
    everything = [len(tokens) - 1 for tokens in PROMPTS]
    with Group(smollm2_folder, 3, tmp_path / "three", prefix=settings) as group:
        assert group.ready().ranks == 3
        assert_same(list(group.answers(batch("cold")).values()), one, TIE)
        warm = list(group.answers(batch("warm")).values())
        assert_same(warm, one, TIE)
        assert restored(warm) == everything
        guessed = list(group.answers(guided(one)).values())
        assert_same(guessed, one, TIE)
        assert sum(outcome.accepted for outcome in guessed) >= len(PROMPTS)
        assert group.stop() == [0, 0, 0]
    with Group(smollm2_folder, 3, tmp_path / "three", prefix=settings) as group:
        group.ready()
        again = list(group.answers(batch("again")).values())
        assert_same(again, one, TIE)
        assert sum(restored(again)) > sum(everything) // 2
        assert group.stop() == [0, 0, 0]


@pytest.mark.slow  # a small model on two ranks packs in test_group_answers
def test_eight_bits(smollm2_folder: Path, tmp_path: Path) -> None:
    told = []
    for world in (1, 3):
        with Group(smollm2_folder, world, tmp_path / str(world), packing=KvPacking(bits=8)) as group:
            assert group.ready().kv_format == "int8 in groups of 64"
            told.append(list(group.answers(batch("eight")).values()))
            assert set(group.stop()) == {0}
    assert_same(told[1], told[0], PACKED_TIE)
