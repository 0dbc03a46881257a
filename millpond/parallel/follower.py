"""A rank other than 0, from its connection to its exit: it does what it is told, in order, and nothing else.

One thread owns MLX and carries out orders; one reads the control connection, one tells that we are alive. Whatever goes
wrong ends the process: rank 0 notices, and the group is started anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, TypeVar

import mlx.core as mx

from millpond.engine.boot_speculation import trial
from millpond.engine.executor import Executor
from millpond.engine.group import Group, GroupBroken, RankReport
from millpond.engine.orders import (
    Arrive,
    Begin,
    Close,
    Depart,
    Offered,
    Order,
    Prefill,
    SetAside,
    Took,
    Trial,
)
from millpond.engine.prepare import Prepared, prepare
from millpond.engine.sequence import Status
from millpond.lifeline import LOST_STATUS
from millpond.model.load import ModelError
from millpond.observe.log import fields, last_words
from millpond.parallel.backend import machine, versions
from millpond.parallel.channel import Channel, ChannelError
from millpond.parallel.messages import (
    Alive,
    Broken,
    Content,
    Done,
    FromFollower,
    FromLeader,
    Go,
    Hello,
    Reported,
    Restorable,
    Settled,
    Setup,
    Told,
    Vote,
    VoteResult,
    decode_from_leader,
    encode,
)
from millpond.parallel.pulse import Pulse
from millpond.prefix.disk.events import SsdEvent
from millpond.types import GroupSettings

log = logging.getLogger(__name__)

Expected = TypeVar("Expected", Setup, Go, VoteResult, Settled)

CONNECT_SECONDS = 60.0
"""How long rank 0 may take until it listens."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
GREET_SECONDS = 5.0


class Rank(Group):
    """This rank's end of the control connection: its Group while starting. From then on it has nobody to tell."""

    def __init__(self, settings: GroupSettings, open_group: Callable[[], mx.distributed.Group]) -> None:
        self.rank = settings.rank
        self.world = settings.world
        self.inbox: queue.SimpleQueue[FromLeader | SsdEvent] = queue.SimpleQueue()
        self._settings = settings
        self._open_group = open_group
        self._channel = self._connected()
        self._pulse = Pulse(lambda: self.say(Alive()), settings.silence_seconds, self._silent)
        self._pulse.heard(0)
        threading.Thread(target=self._listen, name="rank-0", daemon=True).start()
        hello = Hello(self.rank, self.world, settings.backend, machine(), versions(), settings.flags)
        self.say(hello)
        self._pulse.start()

    # --- starting together ------------------------------------------------------------------------------------

    def setup(self) -> Setup:
        """What rank 0 wants us to be part of."""
        setup = self.expect(Setup)
        self.neighbours = setup.neighbours
        return setup

    def join(self, content: str) -> mx.distributed.Group:
        """Tell which model we have found; the group once all have the same."""
        self.say(Content(content))
        self.expect(Go)
        group = self._open_group()
        self._pulse.arm()
        return group

    def unanimous(self, vote: bool) -> bool:
        """Tell our vote; whether all have voted yes."""
        self.say(Vote(vote))
        return self.expect(VoteResult).unanimous

    def settle(self, found: RankReport) -> RankReport:
        """Tell what we can do; what all can."""
        self.say(Reported(found))
        return self.expect(Settled).found

    def expect(self, kind: type[Expected]) -> Expected:
        """The next message, which must be of this kind. Raises GroupBroken."""
        message = self.inbox.get()
        if not isinstance(message, kind):
            raise GroupBroken(f"rank 0 says {type(message).__name__} where {kind.__name__} was expected")
        return message

    # --- speaking and listening -------------------------------------------------------------------------------

    def say(self, message: FromFollower) -> None:
        """To rank 0. If it is gone, the thread that listens has noticed."""
        with contextlib.suppress(ChannelError, OSError):
            self._channel.send(encode(message))

    def fail(self, reason: str, status: int = 1) -> NoReturn:
        """Tell rank 0 and end this process, whatever its other threads are doing: a collective cannot be woken."""
        log.error("this rank cannot go on", extra=fields(rank=self.rank, reason=reason))
        self.say(Broken(reason))
        last_words()
        os._exit(status)

    def close(self) -> None:
        """Part in order; rank 0 may be gone already."""
        self._pulse.stop()

    def _connected(self) -> Channel:
        """Rank 0 may still be starting."""
        address, pause = (self._settings.host, self._settings.port), FIRST_PAUSE
        ends = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                connection = socket.create_connection(address, timeout=GREET_SECONDS)
                return Channel.connect(connection, bytes.fromhex(self._settings.secret), GREET_SECONDS)
            except (ChannelError, OSError) as error:
                if time.monotonic() > ends:
                    raise ModelError(f"tp: rank 0 cannot be reached at {address[0]}:{address[1]}: {error}") from error
            threading.Event().wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _listen(self) -> None:
        try:
            while (body := self._channel.receive()) is not None:
                self._pulse.heard(0)
                message = decode_from_leader(body)
                if isinstance(message, Broken):
                    self.fail(f"rank 0 ended the group: {message.reason}", LOST_STATUS)
                if not isinstance(message, Alive):
                    self.inbox.put(message)
                if isinstance(message, Told) and isinstance(message.order, Close):
                    return  # rank 0 may be gone before we have saved everything
        except (ChannelError, OSError) as error:
            self.fail(f"the connection to rank 0 failed: {error}", LOST_STATUS)
        self.fail("rank 0 is gone", LOST_STATUS)

    def _silent(self, rank: int, seconds: float) -> None:
        self.fail(f"rank {rank} has not been heard of for {seconds:.0f} s", LOST_STATUS)


class Worker:
    """Carries out orders, and offers rank 0 what it can restore of waiting requests."""

    def __init__(self, rank: Rank, ready: Prepared) -> None:
        self._rank = rank
        self._ready = ready
        self._executor = Executor(ready)
        self._trial: Callable[[int], float] | None = None
        self._offered: dict[str, tuple[int, bool]] = {}
        """What rank 0 has been told of waiting requests."""
        self._number = 0

    def run(self) -> None:
        """Until told to go. Raises GroupBroken, and what the model's code raises."""
        inbox, prefixes = self._rank.inbox, self._ready.prefixes
        while True:
            try:
                message = inbox.get(timeout=prefixes.patience(time.monotonic()))
            except queue.Empty:
                pass  # a request has waited long enough for the disk
            else:
                match message:
                    case Told(number, order):
                        if number != self._number + 1:
                            raise GroupBroken(f"order {number} came after order {self._number}")
                        self._number = number
                        if isinstance(order, Close):
                            self._rank.close()
                            prefixes.close(inbox)
                            return
                        self._obey(order)
                    case Setup() | Go() | VoteResult() | Settled() | Broken() | Alive():
                        raise GroupBroken(f"rank 0 says {type(message).__name__} between orders")
                    case event:
                        prefixes.on_event(event)
            if inbox.empty():
                prefixes.offer(self, self._executor.sequences, time.monotonic())

    def _obey(self, order: Order) -> None:
        executor, prefixes = self._executor, self._ready.prefixes
        match order:
            case Trial(tokens):
                self._trial = self._trial or trial(self._ready.model, self._ready.capabilities)
                self._trial(tokens)
                return
            case Begin(name, position, check):
                can = prefixes.restorable(executor.sequences[name], position, check)
                if can == position:
                    executor.begin(name, position)
                self._rank.say(Restorable(name, can))
                return
            case Arrive():
                self._trial = None
            case SetAside(name) | Depart(name):
                self._offered.pop(name, None)
        begun = time.monotonic()
        executor.obey(order)
        if isinstance(order, Prefill):
            start, longest = (max(by) for by in zip(*((c.start, c.end - c.start) for c in order.chunks), strict=True))
            self._ready.costs.observe_prefill(start, longest, (time.monotonic() - begun) * 1000, len(order.chunks))
        if isinstance(order, Took):
            self._rank.say(Done(self._number))

    # who waits, for prefixes.offer

    @property
    def queue(self) -> Iterable[tuple[str, int]]:
        """Requests without a row, and how much of them has been read."""
        executor = self._executor
        for name, sequence in executor.sequences.items():
            if sequence.status is not Status.DECODING:
                yield name, sequence.prompt.length if sequence.prompt is not None else 0

    def offer(
        self,
        name: str,
        cached: int,
        wants: bytes | None,  # noqa: ARG002
        held: bool = False,
        stops: tuple[int, ...] = (),  # noqa: ARG002
    ) -> None:
        """Tell rank 0, if it does not know. See Scheduler.offer."""
        if self._executor.sequences[name].prompt is None and self._offered.get(name) != (cached, held):
            self._offered[name] = cached, held
            self._rank.say(Offered(self._rank.rank, name, cached, held))


def serve(settings: GroupSettings, open_group: Callable[[], mx.distributed.Group]) -> int:
    """Be a rank until told to go; returns the exit code."""
    rank: Rank | None = None
    try:
        rank = Rank(settings, open_group)
        setup = rank.setup()
        ready = prepare(setup.start, Path(settings.model), lambda _stage, _done: None, rank.inbox.put, rank)
        log.info("rank ready", extra=fields(rank=rank.rank, ranks=rank.world))
        Worker(rank, ready).run()
    except Exception as error:
        log.exception("this rank cannot go on")
        if rank is not None:
            # What the backend itself complains of is another rank that is gone.
            status = LOST_STATUS if str(error).startswith(f"[{settings.backend}]") else 1
            rank.fail(str(error) or type(error).__name__, status)
        return 1
    return 0
