"""What telling the other ranks costs per decode step, without the collectives: two processes on this machine.

    python benchmarks/control_plane.py [--rows 8] [--steps 5000]

This process is a real Leader. The other one has a real channel, decodes every order and acknowledges as a follower
does, but computes nothing. A step is Fit, Decode, Launch and Took. "told": how long the thread that decides is kept,
which is all that a step waits for. "done": until the answer to a Begin behind the step is here. "back to back": a
step's share of many that are told without waiting, so of whichever side is slower.
"""

from __future__ import annotations

import argparse
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from random import Random
from typing import NoReturn

import mlx.core as mx
import msgspec
import numpy as np

from millpond.engine.orders import Arrive, Begin, Close, Decode, Fit, Launch, Order, SetAside, Took
from millpond.parallel.backend import machine, versions
from millpond.parallel.channel import Channel
from millpond.parallel.leader import Leader
from millpond.parallel.messages import (
    Alive,
    Content,
    Done,
    FromFollower,
    Hello,
    Restorable,
    Setup,
    Told,
    decode_from_leader,
    encode,
)
from millpond.types import GroupSettings, Request, SamplingParams
from millpond.wire import Start

LOOPBACK = "127.0.0.1"
DIGEST = "0" * 64
SECONDS = 30.0
VOCABULARY = 150_000
ASKED = "asked"
WARM_UP = 200
FRAME_BYTES = 20
"""Of a frame, besides its body."""


def follow(settings: GroupSettings) -> None:
    """The other process."""
    connection = socket.create_connection((settings.host, settings.port), timeout=SECONDS)
    channel = Channel.connect(connection, bytes.fromhex(settings.secret), SECONDS)

    def say(message: FromFollower) -> None:
        channel.send(encode(message))

    say(Hello(settings.rank, settings.world, settings.backend, machine(), versions()))
    while (body := channel.receive()) is not None:
        match decode_from_leader(body):
            case Alive():
                say(Alive())
            case Setup():
                say(Content(DIGEST))
            case Told(_, Begin(name, position)):
                say(Restorable(name, position))
            case Told(number, Took()):
                say(Done(number))
            case Told(_, Close()):
                return


def fail(reason: str) -> NoReturn:
    sys.exit(reason)


def steps(rows: int, drafts: int, chance: Random) -> list[Order]:
    """What is told of one decode step."""

    def some(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(VOCABULARY) for _ in range(count))

    guessed = tuple(some(drafts) for _ in range(rows)) if drafts else ()
    drawn = tuple(some(1 + drafts // 2) for _ in range(rows))
    return [
        Fit(chance.randrange(1 << 36)),
        Decode(guessed, not drafts, chance.randrange(1 << 32)),
        Launch(),
        Took(drawn, tuple(map(len, drawn))),
    ]


def us(seconds: float) -> float:
    return seconds * 1e6


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return us(time.perf_counter() - start)


def measure(leader: Leader, name: str, rows: int, drafts: int, count: int) -> None:
    chance = Random(rows + drafts)
    told, done = [], []
    orders = [steps(rows, drafts, chance) for _ in range(count)]
    size = sum(len(encode(Told(1 << 20, order))) + FRAME_BYTES for order in orders[0])

    def tell(step: list[Order]) -> None:
        for order in step:
            leader.tell(order)

    def ask() -> None:
        """The answer comes behind those to all that was told before."""
        leader.tell(SetAside(ASKED))
        leader.restorable(Begin(ASKED, 64))

    for number, step in enumerate(orders):
        start = time.perf_counter()
        tell(step)
        middle = time.perf_counter()
        ask()
        if number >= WARM_UP:
            told.append(us(middle - start))
            done.append(us(time.perf_counter() - start))
    asked = [timed(ask) for _ in range(count)]

    def all_at_once() -> None:
        for step in orders:
            tell(step)
        ask()

    row = f"{name:34}"
    for values in (told, done, asked):
        median, high = np.percentile(values, [50, 99])
        row += f" {median:8.0f} {high:8.0f}"
    print(f"{row} {timed(all_at_once) / count:12.0f} {size:8,}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What telling the other ranks costs.")
    parser.add_argument("--rows", type=int, default=8, help="requests in the batch")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.follow:
        follow(msgspec.json.decode(sys.stdin.readline(), type=GroupSettings))
        return
    listener = socket.create_server((LOOPBACK, 0))
    settings = GroupSettings(
        rank=1,
        world=2,
        backend="ring",
        host=LOOPBACK,
        port=listener.getsockname()[1],
        secret=secrets.token_hex(32),
        model="",
        silence_seconds=SECONDS,
    )
    start = Start(model_path="", max_batch=given.rows, max_itl_ms=400.0)
    place = msgspec.structs.replace(settings, rank=0, listen_fd=listener.detach())
    leader = Leader(place, start, mx.distributed.init, fail)
    other = subprocess.Popen([sys.executable, __file__, "--follow"], stdin=subprocess.PIPE)
    assert other.stdin is not None
    other.stdin.write(msgspec.json.encode(settings) + b"\n")
    other.stdin.close()
    leader.join(DIGEST)
    leader.tell(Arrive(Request(id=ASKED, tokens=[1], params=SamplingParams(max_tokens=1))))
    print(f"{'':34} {'told, us':>17} {'done, us':>17} {'a Begin alone, us':>17} back to back   bytes")
    print(f"{'':34} {'  median     99 % ' * 3}     us/step  a step")
    for drafts in (0, 7, 15):
        what = f"{given.rows} rows" + (f", {drafts} draft tokens each" if drafts else "")
        measure(leader, what, given.rows, drafts, given.steps)
    leader.tell(Close())
    other.wait(SECONDS)


if __name__ == "__main__":
    main()
