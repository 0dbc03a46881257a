"""Two checkouts of Millpond in pairs: throughput at 1, 8 and 16 streams, with penalties, and TTFT after a restart.

    python benchmarks/checkouts.py BEFORE/.venv/bin/millpond AFTER/.venv/bin/millpond [--model demo] [--rounds 5]

Both servers run all the time; work goes to one and then to the other, so that what else the machine does meets both.
The ratio of each pair (after / before; above 1: more tokens per second, or a longer wait) is printed as a median with
the smallest and the largest.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
from servers import Running, Server, running

from millpond.bench.prompts import story

TOKENS = 64
CACHE = "--cache-dir {folder} --cache-ssd 4GB --ssd-policy all"


def server(command: str, model: str, folder: Path) -> Server:
    flags = CACHE.format(folder=folder)
    return Server(command, f"{command} serve {model} --port {{port}} --max-batch 16 --spec off {flags}", "")


async def answers(url: str, prompts: list[str], **fields: object) -> tuple[float, float]:
    """All at once: tokens per second, and seconds to the first token of any."""
    async with httpx.AsyncClient(base_url=url, timeout=600.0, trust_env=False) as client:
        began = time.perf_counter()

        async def ask(prompt: str) -> tuple[int, float]:
            body = {
                "prompt": prompt,
                "max_tokens": TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                **fields,
            }
            body["stream_options"] = {"include_usage": True}
            tokens, first = 0, 0.0
            async with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if '"text":"' in line and not first:
                        first = time.perf_counter() - began
                    if '"completion_tokens":' in line:
                        tokens = int(line.split('"completion_tokens":')[1].split(",")[0].rstrip("}"))
            return tokens, first

        done = await asyncio.gather(*map(ask, prompts))
        return sum(tokens for tokens, _ in done) / (time.perf_counter() - began), min(first for _, first in done)


def streams(count: int, words: int, **fields: object) -> Callable[[str, str], Awaitable[float]]:
    async def rate(url: str, salt: str) -> float:
        prompts = [story(f"{salt} {number}", words) for number in range(count)]
        if words > 200:  # the prompts are read first: what is measured is decoding
            await answers(url, prompts, **fields | {"max_tokens": 1})
        return (await answers(url, prompts, **fields))[0]

    return rate


WORK = {
    "1 stream, tok/s": streams(1, 100),
    "8 streams, tok/s": streams(8, 100),
    "16 streams, tok/s": streams(16, 100),
    "16 of 2000 tokens with penalties, tok/s": streams(
        16, 2000, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1
    ),
}


def shown(name: str, pairs: list[tuple[float, float]]) -> None:
    ratios = [after / before for before, after in pairs]
    before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"{name:42} {before:9.3f} {after:9.3f}   ratio {statistics.median(ratios):.3f} ({spread})", flush=True)


def measure(commands: list[str], model: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        sides = [server(command, model, Path(place, str(number))) for number, command in enumerate(commands)]
        logs = [Path(place, f"{number}.log") for number in range(2)]
        up: list[Running] = [stack.enter_context(running(side, log)) for side, log in zip(sides, logs, strict=True)]
        for name, work in WORK.items():
            pairs = []
            for number in range(rounds):
                order = (0, 1) if number % 2 == 0 else (1, 0)
                rates = {side: asyncio.run(work(up[side].url, f"{name} {number}")) for side in order}
                pairs.append((rates[0], rates[1]))
            shown(name, pairs)
        prompt = [story("restart", 2000)]
        for one in up:
            asyncio.run(answers(one.url, prompt))
        stack.close()
        restarts: list[tuple[float, float]] = []
        for number in range(rounds):
            firsts = {}
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                with running(sides[side], logs[side]) as one:
                    firsts[side] = asyncio.run(answers(one.url, prompt))[1]
            restarts.append((firsts[0], firsts[1]))
        shown("TTFT after a restart, 2000 tokens, s", restarts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two checkouts of Millpond in pairs.")
    parser.add_argument("commands", nargs=2, metavar="MILLPOND", help="the command of each, before and after")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    measure(given.commands, given.model, given.rounds)


if __name__ == "__main__":
    main()
