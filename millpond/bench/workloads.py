"""The named workloads. Each is a coroutine that sends requests to one server and returns what came back.

A workload depends only on its sizes and the salt: the same salt sends the same bytes. Texts of different requests
differ from their first words on unless sharing is the point of the workload.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from millpond.bench.prompts import request_text, story
from millpond.bench.stream import Ask, Endpoint, Message, Reply


@dataclass(frozen=True)
class Sizes:
    """How large the requests are."""

    salt: str
    tokens: int = 64
    """Tokens of each answer."""
    prompt_scale: float = 1.0
    """Every prompt length is multiplied by it: small models with a short context need less."""
    repeats: int = 3
    """Requests of the workload ``single``."""

    def prompt(self, tokens: int) -> int:
        return max(1, round(tokens * self.prompt_scale))


@dataclass
class Outcome:
    """All replies of one workload, the seconds it took, and figures only it has."""

    replies: list[Reply]
    wall: float
    notes: dict[str, float] = field(default_factory=dict)
    """Seconds unless the name says otherwise."""


@dataclass(frozen=True)
class Workload:
    """A name, how many requests it sends with given sizes, and the coroutine; ``tick`` is called as each one ends."""

    name: str
    about: str
    count: Callable[[Sizes], int]
    run: Callable[[Endpoint, Sizes, Callable[[Reply], None]], Awaitable[Outcome]]


Tick = Callable[[Reply], None]


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


async def _at_most(endpoint: Endpoint, asks: list[Ask], width: int, tick: Tick) -> Outcome:
    """Send all, at most ``width`` at a time, the next as soon as one ends."""
    gate = asyncio.Semaphore(width)

    async def one(ask: Ask) -> Reply:
        async with gate:
            reply = await endpoint.ask(ask)
        tick(reply)
        return reply

    started = time.perf_counter()
    replies = await asyncio.gather(*(one(ask) for ask in asks))
    return Outcome(list(replies), time.perf_counter() - started)


def _distinct(sizes: Sizes, name: str, count: int) -> list[Ask]:
    texts = (request_text(f"{sizes.salt}/{name}/{index}", sizes.prompt(100)) for index in range(count))
    return [Ask(_user(text), sizes.tokens) for text in texts]


async def _single(endpoint: Endpoint, sizes: Sizes, tick: Tick) -> Outcome:
    return await _at_most(endpoint, _distinct(sizes, "single", sizes.repeats), 1, tick)


async def _concurrent_8(endpoint: Endpoint, sizes: Sizes, tick: Tick) -> Outcome:
    return await _at_most(endpoint, _distinct(sizes, "concurrent-8", 8), 8, tick)


async def _concurrent_16(endpoint: Endpoint, sizes: Sizes, tick: Tick) -> Outcome:
    return await _at_most(endpoint, _distinct(sizes, "concurrent-16", 32), 16, tick)


async def _seeded_8(endpoint: Endpoint, sizes: Sizes, tick: Tick) -> Outcome:
    plain = _distinct(sizes, "seeded-8", 8)
    asks = [Ask(ask.messages, ask.max_tokens, temperature=0.7, seed=1000 + index) for index, ask in enumerate(plain)]
    return await _at_most(endpoint, asks, 8, tick)


async def _shared_prefix(endpoint: Endpoint, sizes: Sizes, tick: Tick) -> Outcome:
    system = {"role": "system", "content": story(f"{sizes.salt}/shared", sizes.prompt(1500))}
    asks = [Ask([system, *ask.messages], ask.max_tokens) for ask in _distinct(sizes, "shared-prefix", 12)]
    return await _at_most(endpoint, asks, 4, tick)


async def _multi_turn(endpoint: Endpoint, sizes: Sizes, tick: Tick) -> Outcome:
    """Six turns; each sends the whole history, the answers as received included."""
    history: list[Message] = []
    replies: list[Reply] = []
    notes: dict[str, float] = {}
    started = time.perf_counter()
    for turn in range(6):
        text = request_text(f"{sizes.salt}/multi-turn/{turn}", sizes.prompt(100))
        history.append({"role": "user", "content": text})
        reply = await endpoint.ask(Ask(list(history), sizes.tokens))
        tick(reply)
        replies.append(reply)
        history.append({"role": "assistant", "content": reply.text})
        if reply.ttft is not None:
            notes[f"TTFT of turn {turn + 1}"] = reply.ttft
    return Outcome(replies, time.perf_counter() - started, notes)


async def _prompt_2000(endpoint: Endpoint, sizes: Sizes, tick: Tick) -> Outcome:
    text = request_text(f"{sizes.salt}/prompt-2000", sizes.prompt(2000))
    return await _at_most(endpoint, [Ask(_user(text), min(8, sizes.tokens))], 1, tick)


RUNNING = 4
UNDER_WAY = 4
"""Pieces of text that each running stream must have sent before the long prompt goes out."""


async def _long_prompt(endpoint: Endpoint, sizes: Sizes, tick: Tick) -> Outcome:
    """Four streams run; once all are under way a long prompt arrives. Shows what it does to the four."""
    under_way = asyncio.Event()
    seen: set[int] = set()

    async def running(index: int) -> Reply:
        def on_text(reply: Reply) -> None:
            if len(reply.arrivals) >= UNDER_WAY:
                mark(index)

        text = request_text(f"{sizes.salt}/running/{index}", sizes.prompt(100))
        reply = await endpoint.ask(Ask(_user(text), 4 * sizes.tokens, role="running"), on_text)
        mark(index)
        tick(reply)
        return reply

    def mark(index: int) -> None:
        seen.add(index)
        if len(seen) == RUNNING:
            under_way.set()

    started = time.perf_counter()
    tasks = [asyncio.create_task(running(index)) for index in range(RUNNING)]
    await under_way.wait()
    long_text = request_text(f"{sizes.salt}/long-prompt", sizes.prompt(3000))
    long_reply = await endpoint.ask(Ask(_user(long_text), min(8, sizes.tokens), role="long"))
    tick(long_reply)
    replies = [*await asyncio.gather(*tasks), long_reply]
    return Outcome(replies, time.perf_counter() - started, _interference(replies[:-1], long_reply))


def _interference(running: list[Reply], late: Reply) -> dict[str, float]:
    """Figures of the running streams between the sending of the long prompt and its first token."""
    notes: dict[str, float] = {}
    if late.ttft is not None:
        notes["TTFT of the long prompt"] = late.ttft
    until = late.arrivals[0] if late.arrivals else late.ended
    gaps = [
        after - before
        for reply in running
        for before, after in zip(reply.arrivals, reply.arrivals[1:], strict=False)
        if after > late.sent and before < until
    ]
    if gaps:
        notes["largest gap of the running streams meanwhile"] = max(gaps)
        notes["p99 gap of the running streams meanwhile"] = sorted(gaps)[math.ceil(0.99 * len(gaps)) - 1]
        notes["mean gap of the running streams meanwhile"] = sum(gaps) / len(gaps)
    notes["running streams that lasted (count)"] = sum(reply.ended > until for reply in running if reply.ok)
    return notes


def _fixed(count: int) -> Callable[[Sizes], int]:
    return lambda _: count


ALL = (
    Workload("single", "one stream at a time", lambda sizes: sizes.repeats, _single),
    Workload("concurrent-8", "8 requests at once", _fixed(8), _concurrent_8),
    Workload("concurrent-16", "32 requests, 16 at a time", _fixed(32), _concurrent_16),
    Workload("seeded-8", "8 at once, temperature 0.7, each with a seed", _fixed(8), _seeded_8),
    Workload("shared-prefix", "12 requests with one 1500-token system prompt, 4 at a time", _fixed(12), _shared_prefix),
    Workload("multi-turn", "a conversation of 6 turns that resends its history", _fixed(6), _multi_turn),
    Workload("long-prompt", "4 running streams, then a 3000-token prompt", _fixed(RUNNING + 1), _long_prompt),
    Workload("prompt-2000", "time to first token of one cold 2000-token prompt", _fixed(1), _prompt_2000),
)

BY_NAME = {workload.name: workload for workload in ALL}
