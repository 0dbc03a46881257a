"""One life of the engine: its process and, where ranks share the model, the followers that live and die with it.

Whatever ends first ends all: the socket is given up, so that the reader hears of it at once, and ``end`` kills the rest
without patience, because a rank whose peer is gone may wait for it in native code for ever. What is blamed is the rank
that failed first, not those that failed because of it. Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

import msgspec

from millpond import wire
from millpond.launch.followers import Ending, Followers, GroupPlan
from millpond.launch.process import EngineProcess

CRASH_PATIENCE = 0.5
"""Seconds given to an engine that closed its socket before it is terminated."""
GRACE = 0.5
"""Seconds for the rank to end whose failure ended the others, before the rest is killed. Clients have been told."""
FAREWELL = 2.0
"""Seconds that followers may outlive rank 0 in an orderly stop."""


class EngineGroup:
    """Rank 0, or the only engine process, as the rest of the client sees it. ``spawn`` one, then always ``end`` it."""

    def __init__(self, process: EngineProcess, followers: Followers | None) -> None:
        """``spawn`` makes them."""
        self._process = process
        self._followers = followers
        self._stopping = False
        self._leader_failed_at = 0.0
        """When the process said that it could not go on, or was found to be gone; 0: neither."""

    @classmethod
    async def spawn(
        cls, command: Sequence[str], environment: Mapping[str, str], start: wire.Start, plan: GroupPlan | None
    ) -> EngineGroup:
        """Start everything and tell it what to load. Raises OSError."""
        if plan is None:
            process = await EngineProcess.spawn(command, environment)
            process.send(start)
            return cls(process, None)
        followers = Followers.assemble(plan)
        try:
            process = await EngineProcess.spawn(command, environment, (followers.descriptor,))
        except BaseException:
            followers.release()
            raise
        group = cls(process, followers)
        try:
            process.send(msgspec.structs.replace(start, group=followers.leader))
            followers.release()
            await followers.start(group._follower_ended)
        except BaseException:
            await group.end()
            raise
        return group

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def pids(self) -> tuple[int, ...]:
        """Of all processes on this machine, rank 0's first."""
        return self._process.pid, *(self._followers.pids if self._followers is not None else ())

    def send(self, message: wire.ToEngine) -> None:
        """Queue one message for rank 0. Raises WireError when too large."""
        self._stopping = self._stopping or isinstance(message, wire.Stop)
        self._process.send(message)

    async def receive(self) -> wire.FromEngine | None:
        """The next message; None when it or any follower is gone. Raises WireError for what makes no sense."""
        message = await self._process.receive()
        if (message is None or isinstance(message, wire.Fatal)) and not self._leader_failed_at:
            self._leader_failed_at = time.monotonic()
        return message

    def _follower_ended(self) -> None:
        if not self._stopping:
            self._process.abandon()

    def give_up(self) -> None:
        """It hangs: make an end of it. ``receive`` returns at once, however long the system takes to kill."""
        self._process.kill()
        self._process.abandon()

    def terminate(self) -> None:
        """SIGTERM to rank 0, which tells the others."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL for all, now, without waiting; for a forced exit."""
        self._process.kill()
        if self._followers is not None:
            self._followers.kill()

    async def end(self, fatal: str = "") -> str:
        """See everybody out; returns the reason. ``fatal`` is what rank 0 said to it."""
        if self._followers is None:
            ending = await self._process.end(CRASH_PATIENCE)
            return fatal or f"the engine process {ending}"
        if self._stopping:
            reason = f"rank 0 {await self._process.end(CRASH_PATIENCE)}"
            await self._followers.end(FAREWELL)
            return fatal or reason
        await self._followers.culprit_or_all(GRACE)
        reason = self._blamed(self._followers.endings, fatal)
        self._process.kill()
        await asyncio.gather(self._process.end(0.0), self._followers.end(0.0))
        return reason

    def _blamed(self, endings: Sequence[Ending], fatal: str) -> str:
        """The reason of the rank that failed first."""
        own = [ending for ending in endings if not ending.consequence]
        first = next((ending for ending in own if ending.killed), None)
        if first is None and own and (not self._leader_failed_at or own[0].at <= self._leader_failed_at):
            first = own[0]
        if first is not None:
            return first.text
        if fatal:
            # It may be what a follower did that rank 0 could not go on with; often rank 0 has heard why.
            new = own and fatal.rpartition(": ")[2] not in own[0].text
            return f"{fatal} ({own[0].text})" if new else fatal
        if self._process.ending:
            return f"rank 0 {self._process.ending}"
        return endings[0].text if endings else "rank 0 closed its connection"
