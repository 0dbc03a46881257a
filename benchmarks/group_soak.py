"""Mixed load on a group of ranks for as long as asked: answers must repeat, nothing may hang, memory must stay flat.

Clients talk to the engine as the front end does: conversations that grow and share prefixes, greedy and sampled, with
penalties, with draft tokens, of several clients; a fifth of them leave in the middle. A quarter of the requests repeat
an earlier one, and have to get the same tokens. Every minute a line: requests, tokens, repeats that differed, restarts,
resident memory of each rank. The exit status is 1 if an answer differed, the group was restarted, or memory grew.

    python benchmarks/group_soak.py FOLDER --ranks 2 --minutes 30
    sudo python benchmarks/lossy_link.py --delay-ms 2 --loss 0.5 -- python benchmarks/group_soak.py FOLDER --minutes 30

The second form runs rank 1 in another network namespace, behind a link that is slow and loses packets.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from millpond import wire
from millpond.client import EngineClient
from millpond.client.stream import EngineError
from millpond.config import read_config
from millpond.launch.followers import RANK_COMMAND, GroupPlan
from millpond.launch.layout import group_layout
from millpond.settings import PrefixSettings
from millpond.types import Request, SamplingParams, SpecMode, SpecSettings, Speculation

CLIENTS = 8
PATIENCE = 60.0
"""Seconds without a token after which an answer counts as hanging."""
GROWTH = 1.15
"""Times the resident memory of the first third that the last third may reach."""


class Soak:
    """The load, and what has been seen of it."""

    def __init__(self, client: EngineClient, seed: int) -> None:
        self._client = client
        self._chance = random.Random(seed)
        self._known: dict[str, tuple[Request, str]] = {}
        self._shared = [self._words(self._chance.randrange(20, 150)) for _ in range(6)]
        self.count = 0
        self.tokens = 0
        self.cancelled = 0
        self.repeated = 0
        self.cached = 0
        self.differed: list[str] = []
        self.failed: list[str] = []

    def _words(self, count: int) -> list[int]:
        return [self._chance.randrange(3, 250) for _ in range(count)]

    def _next(self) -> Request:
        self.count += 1
        name = f"q{self.count}"
        if self._known and self._chance.random() < 0.25:
            old, _ = self._chance.choice(list(self._known.values()))
            return Request(id=name, tokens=old.tokens, params=old.params, client=old.client)
        tokens = [*self._chance.choice(self._shared), *self._words(self._chance.randrange(1, 60))]
        params = SamplingParams(
            max_tokens=self._chance.choice([1, 5, 20, 60]),
            temperature=self._chance.choice([0.0, 0.0, 0.7, 1.2]),
            top_p=self._chance.choice([1.0, 0.9]),
            repetition_penalty=self._chance.choice([1.0, 1.0, 1.1]),
            seed=self._chance.getrandbits(32),
            stop_token_ids=self._chance.choice([[], [7]]),
        )
        return Request(id=name, tokens=tokens, params=params, client=f"c{self._chance.randrange(3)}")

    async def client(self, until: float) -> None:
        """One after the other."""
        while time.monotonic() < until:
            request = self._next()
            leaves = self._chance.random() < 0.2
            key = hashlib.sha256(repr((request.tokens, request.params)).encode()).hexdigest()
            try:
                tokens = await self._answer(request, self._chance.randrange(1, 20) if leaves else None)
            except (EngineError, TimeoutError) as error:
                self.failed.append(f"{request.id}: {error!r}")
                await asyncio.sleep(0.5)
                continue
            if tokens is None:
                self.cancelled += 1
                continue
            self.tokens += len(tokens)
            if len(self._known) > 500:
                self._known.pop(next(iter(self._known)))
            digest = hashlib.sha256(repr(tokens).encode()).hexdigest()
            if key in self._known:
                self.repeated += 1
                if self._known[key][1] != digest:
                    self.differed.append(request.id)
            else:
                self._known[key] = request, digest
            if self._chance.random() < 0.1:  # the conversation goes on
                place = self._chance.randrange(len(self._shared))
                self._shared[place] = [*request.tokens, *tokens][-220:]

    async def _answer(self, request: Request, leave_after: int | None) -> list[int] | None:
        """Its tokens; None when the client has left."""
        stream = self._client.submit(request)
        tokens: list[int] = []
        try:
            while True:
                async with asyncio.timeout(PATIENCE):
                    delta = await anext(stream, None)
                if delta is None:
                    return tokens
                tokens += delta.tokens
                if delta.prefix is not None:
                    self.cached += delta.prefix.cached
                if leave_after is not None and len(tokens) >= leave_after:
                    return None
        finally:
            stream.cancel()


def resident(pid: int) -> float:
    """MiB of a process; 0 for one that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def soak(args: argparse.Namespace) -> int:
    """Run it; returns the exit status."""
    flags = {"hostfile": args.hostfile} if args.hostfile else {"tp": str(args.ranks)}
    layout = group_layout(read_config(flags, {}), {}, frozenset({"127.0.0.1"}))
    assert layout is not None
    with tempfile.TemporaryDirectory() as folder:
        start = wire.Start(
            model_path=args.model,
            max_batch=8,
            max_itl_ms=400,
            kv_memory_bytes=args.kv_mb * 2**20,
            prefix=PrefixSettings(cache_dir=folder, cache_ssd=1 << 30),
            spec=SpecSettings(default=Speculation(mode=SpecMode.NGRAM, tokens=4, adaptive=False)),
        )
        ranks = GroupPlan(layout, args.model, args.model, ssh=tuple(args.ssh.split()))
        client = EngineClient(start, command=RANK_COMMAND, group=ranks, stall_timeout=60.0)
        await client.start()
        try:
            await client.settled()
            load = Soak(client, args.seed)
            begun = time.monotonic()
            until = begun + args.minutes * 60
            clients = [asyncio.create_task(load.client(until)) for _ in range(CLIENTS)]
            memory: list[list[float]] = []
            while not all(task.done() for task in clients):
                await asyncio.wait(clients, timeout=min(60.0, max(1.0, until - time.monotonic() + 1)))
                memory.append([round(resident(pid), 1) for pid in client.pids])
                line = {
                    "minutes": round((time.monotonic() - begun) / 60, 1),
                    "requests": load.count,
                    "tokens": load.tokens,
                    "cancelled": load.cancelled,
                    "repeated": load.repeated,
                    "differed": len(load.differed),
                    "failed": len(load.failed),
                    "restarts": client.counts.restarts,
                    "cached_tokens": load.cached,
                    "preemptions": client.beat.counters.preemptions if client.beat else None,
                    "accepted_draft_tokens": client.beat.counters.spec.accepted if client.beat else None,
                    "resident_mib": memory[-1],
                }
                print(json.dumps(line), flush=True)
            for task in clients:
                task.result()
        finally:
            await client.stop()
    third = max(1, len(memory) // 3)
    early, late = max(map(sum, memory[:third])), max(map(sum, memory[-third:]))
    wrong = [*load.differed, *load.failed]
    print(f"memory: {early:.0f} MiB in the first third, {late:.0f} MiB in the last; wrong: {wrong[:10]}")
    return int(bool(wrong) or client.counts.restarts > 0 or late > GROWTH * early)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a small model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--kv-mb", type=int, default=64, help="memory for keys and values; little of it means preemptions"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hostfile", default=os.environ.get("SOAK_HOSTFILE", ""), help="instead of --ranks")
    parser.add_argument("--ssh", default=os.environ.get("SOAK_SSH", "ssh"), help="what starts ranks on other hosts")
    return asyncio.run(soak(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
