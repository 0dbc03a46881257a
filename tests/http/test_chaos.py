"""Everything at once, for a while: nobody hangs, the books balance at every look, and nothing is left behind.

A real server with a tiny model and little memory; clients that come in bursts, leave, read slowly, send nonsense; an
engine that is killed and frozen. ``make test`` does it for a moment, ``make test-all`` for ten minutes.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import tiny_models
from prefix_client import settled, wait_until

if TYPE_CHECKING:
    from conftest import Launch, Server

ALLOWED = {200, 400, 413, 429, 500, 503, 504}
HANG_SECONDS = 90
"""No request takes as long, whatever happens."""
BURST = 200


@dataclass
class Chaos:
    """``ends`` counts how requests ended, as the clients saw it."""

    server: Server
    seconds: float
    chance: random.Random
    ends: Counter[str] = field(default_factory=Counter)
    scrapes: int = 0

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=HANG_SECONDS, limits=limits) as self.http:
            over = asyncio.get_running_loop().time() + self.seconds
            async with asyncio.TaskGroup() as group:
                for part in (self.steady, self.steady, self.steady, self.steady, self.bursts, self.kills, self.looks):
                    group.create_task(self.until(over, part))

    async def warm_up(self) -> None:
        """Threads are started when they are first needed."""
        async with httpx.AsyncClient(base_url=self.server.url, timeout=HANG_SECONDS) as self.http:
            await asyncio.gather(*(self.http.post("/v1/completions", json=self.body(n=1)) for _ in range(16)))

    async def until(self, over: float, part: object) -> None:
        while asyncio.get_running_loop().time() < over:
            await part()  # type: ignore[operator]

    # --- what happens to it ---------------------------------------------------------------------------------------

    async def steady(self) -> None:
        await self.one()

    async def bursts(self) -> None:
        await asyncio.sleep(self.chance.uniform(1, 8))
        async with asyncio.TaskGroup() as group:
            for _ in range(self.chance.choice([20, BURST])):
                group.create_task(self.one())

    async def kills(self) -> None:
        await asyncio.sleep(self.chance.uniform(3, 15))
        health = (await self.http.get("/health")).json()
        if health["engine"]["state"] == "ready":
            try:
                os.kill(self.server.engine_pid(), self.chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
                self.ends["engines ended"] += 1
            except (ProcessLookupError, IndexError):
                return  # it has just died by itself, of the kill before

    async def looks(self) -> None:
        await asyncio.sleep(0.1)
        health = (await self.http.get("/health")).json()
        count = health["requests"]
        assert count["submitted"] == count["finished"] + count["failed"] + count["cancelled"] + count["running"], count
        self.scrapes += 1

    # --- requests -------------------------------------------------------------------------------------------------

    async def one(self) -> None:
        kind = self.chance.choice(
            [self.whole, self.whole, self.stream, self.stream, self.leaves, self.slow, self.wrong]
        )
        try:
            async with asyncio.timeout(HANG_SECONDS):
                await kind()
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.ConnectError):
            self.ends["cut"] += 1

    def body(self, **more: object) -> dict[str, object]:
        start = self.chance.randrange(4)
        length = self.chance.choice([1, 30, 100, 300])
        return {
            "prompt": [(start * 50 + place) % 250 for place in range(length)],
            "max_tokens": self.chance.choice([1, 5, 60]),
            "n": self.chance.choice([1, 1, 1, 3]),
            "priority": self.chance.choice([0, 0, 0, -1, 1]),
            "ignore_eos": True,
            "seed": 1,
            "user": self.chance.choice("abc"),
            **more,
        }

    async def whole(self) -> None:
        body = self.body()
        answer = await self.http.post("/v1/completions", json=body)
        self.note(answer)
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == body["max_tokens"] * body["n"]  # type: ignore[operator]

    async def stream(self) -> None:
        """A stream ends with [DONE] or with an error, never without either."""
        body = self.body(stream=True)
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 200:
                events = [line async for line in answer.aiter_lines() if line.startswith("data:")]
                assert events[-1] == "data: [DONE]" or '"error"' in events[-1], events[-1]
                self.ends["streamed" if events[-1] == "data: [DONE]" else "broken off"] += 1
            else:
                await answer.aread()
                self.note(answer)

    async def leaves(self) -> None:
        """Gone before the first token, or in the middle."""
        body = self.body(stream=self.chance.random() < 0.5, max_tokens=200)
        try:
            async with asyncio.timeout(self.chance.uniform(0, 0.5)):
                async with self.http.stream("POST", "/v1/completions", json=body) as answer:
                    await answer.aread()
                    self.note(answer)
        except TimeoutError:
            self.ends["left"] += 1

    async def slow(self) -> None:
        """Reads a little now and then, and gives up."""
        body = self.body(stream=True, max_tokens=400, logprobs=5)
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_raw():
                await asyncio.sleep(0.05)
                if self.chance.random() < 0.1:
                    break
        self.ends["slow"] += 1

    async def wrong(self) -> None:
        content = self.chance.choice([b"{", b'{"prompt": 7}', b'{"prompt": [999999]}', b"x" * 300_000, b"[]"])
        self.note(await self.http.post("/v1/completions", content=content))

    def note(self, answer: httpx.Response) -> None:
        assert answer.status_code in ALLOWED, answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        self.ends[str(answer.status_code)] += 1


def held(pid: int) -> tuple[int, int]:
    """Open files and threads of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), len(list(Path(f"/proc/{pid}/task").iterdir()))


@pytest.mark.parametrize("seconds", [8, pytest.param(240, marks=pytest.mark.slow)])
def test_chaos(seconds: float, byte_tokenizer: Path, tmp_path: Path, launch: Launch) -> None:
    folder = tmp_path / "model"
    tiny_models.save("llama", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_tokenizer / name, folder / name)
    flags = {
        "port": "0",
        "max-batch": "8",
        "max-waiting": "64",
        "kv-memory-mb": "8",
        "cache-ram": "2MB",
        "cache-dir": str(tmp_path / "cache"),
        "cache-ssd": "50MB",
        "ssd-min-free": "0",
        "ssd-policy": "all",
        "max-body": "200KB",
        "stall-timeout": "5s",
        "max-restarts": "100000",
        "write-timeout": "10s",
        "queue-timeout": "30s",
    }
    command = [sys.executable, "-m", "millpond.cli.main", "serve", str(folder)]
    with launch([*command, *(word for name, value in flags.items() for word in (f"--{name}", value))], False) as server:
        ready(server)
        asyncio.run(Chaos(server, 0, random.Random(1)).warm_up())
        before = held(server.process.pid)
        tasks = settled(server)["process"]["tasks"]
        chaos = Chaos(server, seconds, random.Random(7))
        asyncio.run(chaos.run())
        wait_until(server, lambda health: health["engine"]["state"] == "ready")  # type: ignore[comparison-overlap]
        after = wait_until(server, lambda health: rested(health, tasks))
        print(chaos.ends, chaos.scrapes, after["requests"])
        assert chaos.scrapes > seconds
        assert min(chaos.ends[end] for end in ("200", "streamed", "left", "slow", "400", "413", "engines ended")) > 0
        assert after["requests"]["submitted"] > 10 * seconds / 15
        files, threads = held(server.process.pid)
        assert (files <= before[0], threads <= before[1]) == (True, True), (before, files, threads)


def ready(server: Server) -> None:
    server.wait_for_line("listening url=")
    wait_until(server, lambda health: health["status"] == "ok")  # type: ignore[comparison-overlap]


def rested(health: dict[str, dict[str, int]], tasks: int) -> bool:
    """Nothing is held any more. One look is one connection, and one task."""
    requests, engine = health["requests"], health["engine"]
    idle = (requests["held"], requests["running"], engine["running"], engine["waiting"], engine["kv_bytes"])
    return idle == (0, 0, 0, 0, 0) and health["process"]["tasks"] <= tasks
