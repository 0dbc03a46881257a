"""Ranks killed or stopped at any moment: every client is answered, the group comes back warm, nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pytest
from group_support import alive, all_gone, layout_for
from patient_ring import patient
from tiny_models import save
from waiting import eventually

from millpond import wire
from millpond.client import EngineClient, EngineUnavailable
from millpond.client.stream import EngineError
from millpond.launch.followers import RANK_COMMAND, GroupPlan
from millpond.settings import PrefixSettings, SavePolicy
from millpond.types import Request, SamplingParams

ANSWERED_SECONDS = 10.0
"""By the promise in docs/tensor-parallel.md, with its five seconds of silence."""
BACK_SECONDS = 60.0
TOKENS = 60
PROMPTS = [[(place * 7 + number * 13) % 250 for place in range(150)] for number in range(6)]


def request(name: str, tokens: list[int], max_tokens: int) -> Request:
    return Request(id=name, tokens=tokens, params=SamplingParams(max_tokens=max_tokens, temperature=0.0))


async def answer(client: EngineClient, asked: Request) -> tuple[list[int], int]:
    """Its tokens, and how many prompt tokens came from the cache. Raises EngineError."""
    tokens, cached = [], 0
    async with client.submit(asked) as stream:
        async for delta in stream:
            tokens += delta.tokens
            cached += delta.prefix.cached if delta.prefix is not None else 0
    return tokens, cached


async def end_of(client: EngineClient, asked: Request, expected: list[int]) -> str:
    """How a request ended that somebody may have ruined: right, or with an error. Never with a wrong token."""
    try:
        tokens, _ = await answer(client, asked)
    except (EngineError, EngineUnavailable):
        return "error"
    assert tokens == expected
    return "right"


async def chaos(folder: Path, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    start = wire.Start(
        model_path=str(folder),
        max_batch=8,
        max_itl_ms=400,
        prefix=PrefixSettings(cache_dir=str(folder / "prefix"), cache_ssd=1 << 30, ssd_policy=SavePolicy.ALL),
    )
    plan = GroupPlan(layout_for(tp="2"), str(folder), str(folder), environment=patient())
    client = EngineClient(start, command=RANK_COMMAND, environment=patient(), group=plan, max_restarts=10 * rounds)
    seen: set[int] = set()
    warm = 0
    await client.start()
    try:
        await client.settled()
        firsts = [answer(client, request(f"first{number}", tokens, TOKENS)) for number, tokens in enumerate(PROMPTS)]
        expected = [tokens for tokens, _ in await asyncio.gather(*firsts)]
        for turn in range(rounds):
            pids = client.pids
            assert len(pids) == 2
            seen.update(pids)
            asked = [request(f"{turn}.{number}", tokens, TOKENS) for number, tokens in enumerate(PROMPTS)]
            ends = [asyncio.create_task(end_of(client, one, expected[n])) for n, one in enumerate(asked)]
            await asyncio.sleep(chance.random() * 0.6)
            victim, how = pids[turn % 2], (signal.SIGKILL, signal.SIGSTOP)[turn // 2 % 2]
            os.kill(victim, how)
            before = time.monotonic()
            done, late = await asyncio.wait(ends, timeout=ANSWERED_SECONDS)
            assert not late, f"round {turn}: {len(late)} unanswered {ANSWERED_SECONDS} s after {how.name}"
            assert {task.result() for task in done} <= {"right", "error"}
            # Those that ended before the signal came say nothing of it; the group notices all the same.
            async with asyncio.timeout(BACK_SECONDS):
                await eventually(lambda: client.pids and client.pids != pids)  # noqa: B023 - in this round
                assert time.monotonic() - before < 2 * ANSWERED_SECONDS
                await client.settled()
            again = [await answer(client, request(f"{turn}.again{n}", PROMPTS[n], TOKENS)) for n in range(2)]
            assert [tokens for tokens, _ in again] == expected[:2]
            warm += sum(cached >= 64 for _, cached in again)
            await all_gone(pids)
    finally:
        await client.stop()
    assert not [pid for pid in seen if alive(pid)]
    # A busy machine may predict that reading does not pay, or be killed before it has written.
    assert warm >= rounds, "the cache is not warm"
    counts = client.counts
    assert counts.submitted == counts.finished + counts.failed + counts.cancelled + client.open_requests
    assert client.open_requests == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3_5"])
def test_every_rank_killed_and_stopped(kind: str, tmp_path: Path) -> None:
    asyncio.run(chaos(save(kind, tmp_path), 4, 0))  # each way to end each rank


@pytest.mark.slow
def test_every_rank_killed_and_stopped_for_long(tmp_path: Path) -> None:
    asyncio.run(chaos(save("llama", tmp_path), 32, 1))
