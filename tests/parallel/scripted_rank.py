"""Ranks without a model: ``scripted_rank.py --fd N`` is rank 0, ``scripted_rank.py`` a follower.

Rank 0 is the scripted engine of tests/client, whose script is the model's name. It waits for all followers on the
socket that it inherited, and reports its GroupSettings as the lane's reason. Further words of the script:

- ``blind``: rank 0 does not notice lost followers; without the word it says Fatal and exits;
- ``die=S``: follower 1 exits with status 7, S seconds after it is connected, and says why;
- ``deafranks``: followers ignore rank 0's farewell and its end;
- ``late=S``: followers come S seconds late.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent / "client"))

import scripted_engine

from millpond import wire
from millpond.lifeline import LOST_STATUS, die_with_parent
from millpond.types import GroupSettings, ModelInfo


class Leader(scripted_engine.Engine):
    """The scripted engine with followers."""

    def __init__(self, writer: asyncio.StreamWriter, start: wire.Start) -> None:
        super().__init__(writer, scripted_engine.Script(start.model_path), start.spec)
        assert start.group is not None
        self.group = start.group
        self.followers: list[asyncio.StreamWriter] = []
        self.complete = asyncio.Event()

    async def load(self) -> None:
        listener = socket.socket(fileno=self.group.listen_fd)
        assert listener.getsockname() == (self.group.host, self.group.port)
        await asyncio.start_server(self.greet, sock=listener)
        await self.complete.wait()
        await super().load()

    async def greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank, _, secret = (await reader.readline()).decode().strip().partition(" ")
        assert secret == self.group.secret
        self.followers.append(writer)
        if len(self.followers) == self.group.world - 1:
            self.complete.set()
        with contextlib.suppress(asyncio.CancelledError):  # at our own end
            await reader.read()
        if "blind" not in self.script.words:
            self.send(wire.Fatal(f"rank {rank} has closed its connection"))
            await self.writer.drain()
            os._exit(1)

    def info(self) -> ModelInfo:
        return msgspec.structs.replace(super().info(), lane_reason=msgspec.json.encode(self.group).decode())

    def dismiss(self) -> None:
        for follower in self.followers:
            follower.write(b"bye\n")


async def lead(descriptor: int) -> None:
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=descriptor))
    start = await scripted_engine.receive(reader)
    assert isinstance(start, wire.Start)
    leader = Leader(writer, start)
    await leader.serve(reader)
    leader.dismiss()
    await asyncio.sleep(0)


def follow() -> int:
    die_with_parent()
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=GroupSettings)
    threading.Thread(target=end_with_input, daemon=True).start()
    script = scripted_engine.Script(settings.model)
    time.sleep(script.number("late", 0.0))
    print(f"rank {settings.rank} of {settings.world} is here", file=sys.stderr)
    with connected(settings) as connection:
        connection.sendall(f"{settings.rank} {settings.secret}\n".encode())
        if settings.rank == 1 and "die" in script.words:
            time.sleep(float(script.words["die"]))
            print("a shard of layer 3 is missing", file=sys.stderr)
            return 7
        farewell = connection.recv(100)
    if "deafranks" in script.words:
        time.sleep(3600)
    return 0 if farewell else LOST_STATUS


def connected(settings: GroupSettings) -> socket.socket:
    while True:
        try:
            return socket.create_connection((settings.host, settings.port))
        except OSError:
            time.sleep(0.05)


def end_with_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    given = parser.parse_args().fd
    if given is None:
        sys.exit(follow())
    asyncio.run(lead(given))
    os._exit(0)
