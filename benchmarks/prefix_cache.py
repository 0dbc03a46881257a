"""What the prefix cache costs and saves: lookup, eviction, a hit in decode steps, and TTFT after restart and kill -9.

The first part needs no model: it drives the index with empty payloads. The second starts ``millpond serve MODEL`` with
write-through to a fresh folder, and sends one long prompt several times. Every figure is of this one run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from servers import Running, Server, running

from millpond.bench.prompts import story
from millpond.bench.stream import Ask, Endpoint, Reply
from millpond.prefix.cache import PrefixCache
from millpond.prefix.planner import Layout
from millpond.prefix.records import BLOCK, Kind, Tensor

LOG = Path(tempfile.gettempdir()) / "millpond-prefix-bench.log"


@dataclass(frozen=True)
class Nothing:
    """A payload of a given size without data."""

    nbytes: int = 1 << 20
    tensors: tuple[Tensor, ...] = ()

    def dump(self) -> bytes:
        return b""


def filled(blocks: int, chains: int) -> tuple[PrefixCache, list[list[int]]]:
    """A cache with ``blocks`` blocks in ``chains`` conversations."""
    chooser = random.Random(1)
    cache = PrefixCache("bench", Layout(0, False), 1 << 50, lambda _tensors, _bytes: Nothing(), lambda _a, _b: True)
    prompts = [[chooser.randrange(150_000) for _ in range(blocks // chains * BLOCK + 1)] for _ in range(chains)]
    for prompt in prompts:
        query = cache.query(prompt, "")
        for start in range(0, len(prompt) - 1, BLOCK):
            cache.keep(query, start, start + BLOCK, {Kind.KV: Nothing()})
    return cache, prompts


def lookup_ms(tokens: int) -> float:
    """Median time to find a cached prompt of ``tokens`` tokens, from token ids to what can be restored."""
    cache, prompts = filled(tokens // BLOCK, 1)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        query = cache.query(prompts[0], "")
        offer = cache.offer(query, 0.0)
        cache.explain(query, offer.position)
        cache.take(query, offer.position)
        times.append((time.perf_counter() - began) * 1000)
        assert offer.position == len(prompts[0]) - 1
    return statistics.median(times)


def eviction_us(blocks: int) -> float:
    """Mean time of one of 500 evictions from a pool of ``blocks`` blocks."""
    cache, _ = filled(blocks, max(1, blocks // 100))
    began, before = time.perf_counter(), cache.blocks
    cache.fit(cache.nbytes - 500 * (1 << 20))
    return (time.perf_counter() - began) * 1e6 / (before - cache.blocks)


def ask(server: Running, model: str, text: str, tokens: int) -> Reply:
    """One streamed request, temperature 0."""

    async def send() -> Reply:
        async with httpx.AsyncClient(base_url=server.url, timeout=600.0, trust_env=False) as client:
            return await Endpoint(client, model, 600.0).ask(Ask([{"role": "user", "content": text}], tokens))

    return asyncio.run(send())


def ttft(reply: Reply) -> float:
    return reply.arrivals[0] - reply.sent


def step(reply: Reply) -> float:
    """Median time between two tokens."""
    return statistics.median(b - a for a, b in zip(reply.arrivals, reply.arrivals[1:], strict=False))


def engine_pid(server: Running) -> int:
    """The server's only child (Linux)."""
    return int(Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()[0])


def wait_until_back(server: Running) -> None:
    """Until another engine has taken the place of the first."""
    with httpx.Client(base_url=server.url, timeout=60.0, trust_env=False) as client:
        while not (client.get("/health").json()["engine"]["restarts"] and client.get("/readyz").status_code == 200):
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--millpond", default="millpond")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the prompt")
    args = parser.parse_args()

    print(f"lookup of a cached prompt: 32k tokens {lookup_ms(32768):.2f} ms, 2k tokens {lookup_ms(2048):.2f} ms")
    print("one eviction: " + ", ".join(f"{n} blocks {eviction_us(n):.1f} us" for n in (1000, 10_000, 100_000)))

    folder = Path(tempfile.mkdtemp(prefix="millpond-prefix-bench-"))
    command = (
        f"{args.millpond} serve {args.model} --port {{port}} --log-level warning --cache-dir {folder} --ssd-policy all"
    )
    millpond = Server("millpond", command, "")
    text = story("prefix-bench", args.tokens)
    try:
        with running(millpond, LOG) as server:
            name = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"][0]["id"]
            first = ask(server, name, text, 32)
            pace = step(first)
            print(
                f"first: TTFT {ttft(first):.3f} s for {first.prompt_tokens} tokens; a decode step {pace * 1000:.0f} ms"
            )
            for attempt in range(3):
                hit = ask(server, name, text, 32)
                extra = (ttft(hit) - step(hit)) / step(hit)
                print(
                    f"RAM hit {attempt + 1}: TTFT {ttft(hit):.3f} s, cached {hit.cached_tokens} tokens; "
                    f"beyond the one token computed: {extra:.2f} decode steps"
                )
        with running(millpond, LOG) as server:
            again = ask(server, name, text, 32)
            print(
                f"after a restart: TTFT {ttft(again):.3f} s = 1/{ttft(first) / ttft(again):.0f} of the first, "
                f"cached {again.cached_tokens} tokens"
            )
            os.kill(engine_pid(server), signal.SIGKILL)
            wait_until_back(server)
            again = ask(server, name, text, 32)
            print(
                f"after kill -9: TTFT {ttft(again):.3f} s = 1/{ttft(first) / ttft(again):.0f} of the first, "
                f"cached {again.cached_tokens} tokens"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
