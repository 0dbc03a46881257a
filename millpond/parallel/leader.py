"""Rank 0's side of the control connections: it lets the others in, tells them every order, and notices when one fails.

A group cannot lose a rank: the first failure of any kind is told to the front end, with its reason, and ends this
process, whatever its threads are doing; the front end ends the other ranks and starts a new group. Orders are told by
the engine thread only; each follower has a thread here that reads what it says.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NoReturn, TypeVar

import mlx.core as mx
from msgspec.structs import replace

from millpond.engine.group import Group, GroupBroken, RankReport
from millpond.engine.orders import Arrive, Begin, Close, Depart, Offered, Order, SetAside, Took
from millpond.model.load import ModelError
from millpond.observe.log import fields
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
    decode_from_follower,
    encode,
)
from millpond.parallel.pulse import Pulse
from millpond.types import GroupSettings
from millpond.wire import Start

log = logging.getLogger(__name__)

Answer = TypeVar("Answer", Content, Vote, Reported, Restorable)

GREET_SECONDS = 5.0
"""How long a connection may take to prove itself."""
REMIND_SECONDS = 30.0
"""So often it is logged who is still missing."""
LAG = 2.0
"""So many times the silence limit a rank may be behind with what it has been told."""


class Follower:
    """One other rank, as rank 0 knows it."""

    def __init__(self, hello: Hello, channel: Channel) -> None:
        self.rank = hello.rank
        self.hello = hello
        self.channel = channel
        self.answers: queue.SimpleQueue[Content | Vote | Reported | Restorable] = queue.SimpleQueue()
        self.asked = False
        """It owes an answer to a Begin."""
        self.unread: deque[tuple[int, float]] = deque()
        """Numbers of forwards that it has not said to have read, and when it was told that we have; monotonic."""


class Leader(Group):
    """The other ranks, seen from rank 0: the Group of an engine that decides."""

    def __init__(
        self,
        settings: GroupSettings,
        start: Start,
        open_group: Callable[[], mx.distributed.Group],
        fail: Callable[[str], NoReturn],
    ) -> None:
        """``start``: what all ranks are started with. ``open_group`` opens mlx.distributed's group. ``fail``: tells why
        the group cannot go on, and ends the process."""
        self.world = settings.world
        self._settings = settings
        self._start = start
        self._open_group = open_group
        self._fail = fail
        self._followers: dict[int, Follower] = {}
        self._arrived: queue.SimpleQueue[Follower | str] = queue.SimpleQueue()
        self._complete = threading.Event()
        self._number = 0
        self._offers: dict[str, dict[int, Offered]] = {}
        self._deliver: Callable[[Offered], None] = lambda _: None
        self._closing = False
        self._pulse = Pulse(self._beat, settings.silence_seconds, self._silent)

    # --- starting together ------------------------------------------------------------------------------------

    def join(self, content: str) -> mx.distributed.Group:
        """Wait for the other ranks, and let them in if they are what they should be. Raises ModelError."""
        with self._listen() as listener:
            threading.Thread(target=self._accept, args=(listener,), name="group-door", daemon=True).start()
            self._pulse.start()
            while len(self._followers) < self.world - 1:
                self._admit()
            with contextlib.suppress(OSError):  # some systems have no need of it
                listener.shutdown(socket.SHUT_RDWR)  # closed alone, it would take one more connection
        self._complete.set()
        self._turn_away()
        here = machine()
        machines = [here, *(follower.hello.machine for follower in self._followers.values())]
        self.neighbours = machines.count(here)
        for follower in self._followers.values():
            self._send(follower, encode(Setup(self._start, machines.count(follower.hello.machine))))
        for follower in self._followers.values():
            other = self._answer(follower, Content).digest
            if other != content:
                raise ModelError(
                    f"tp: rank {follower.rank} has other weights or another config than rank 0 "
                    f"({other[:12]} and {content[:12]}); all ranks need the same model"
                )
        self._say(Go())
        group = self._open_group()
        self._pulse.arm()
        return group

    def unanimous(self, vote: bool) -> bool:
        """Whether every rank says yes."""
        votes = [vote, *(self._answer(follower, Vote).yes for follower in self._followers.values())]
        self._say(VoteResult(all(votes)))
        return all(votes)

    def settle(self, found: RankReport) -> RankReport:
        """The least that every rank can do. Raises ModelError."""
        all_found = {0: found}
        for follower in self._followers.values():
            all_found[follower.rank] = self._answer(follower, Reported).found
        least = least_of(all_found)
        self._say(Settled(least))
        return least

    def _listen(self) -> socket.socket:
        settings = self._settings
        if settings.listen_fd >= 0:
            return socket.socket(fileno=settings.listen_fd)
        try:
            return socket.create_server((settings.host, settings.port), reuse_port=False)
        except OSError as error:
            raise ModelError(f"tp_port: cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
            except OSError:
                return  # everybody is here, and the door is closed
            name = f"{address[0]}:{address[1]}"
            threading.Thread(target=self._greet, args=(connection, name), name="group-greeter", daemon=True).start()

    def _greet(self, connection: socket.socket, address: str) -> None:
        """Find out who has connected; strangers are logged and turned away."""
        channel: Channel | None = None
        guard = threading.Timer(2 * GREET_SECONDS, lambda: channel.close() if channel is not None else None)
        guard.daemon = True
        try:
            channel = Channel.accept(connection, bytes.fromhex(self._settings.secret), GREET_SECONDS)
            guard.start()
            hello = self._next(channel)
        except (ChannelError, OSError) as error:
            log.warning("a connection to the group was refused", extra=fields(address=address, reason=error))
            connection.close()
            return
        finally:
            guard.cancel()
        if not isinstance(hello, Hello):
            log.warning(
                "a connection to the group was refused", extra=fields(address=address, reason="it said no hello")
            )
            channel.close()
            return
        wrong = self._wrong(hello)
        if wrong:
            with contextlib.suppress(OSError):
                channel.send(encode(Broken(wrong)))
        self._arrived.put(wrong or Follower(hello, channel))
        if self._complete.is_set():
            self._turn_away()

    def _turn_away(self) -> None:
        """Who came when everybody was here already, and would wait for ever."""
        with contextlib.suppress(queue.Empty):
            while True:
                came = self._arrived.get_nowait()
                if isinstance(came, Follower):
                    log.warning("a rank came to a group that is complete", extra=fields(rank=came.rank))
                    with contextlib.suppress(ChannelError, OSError):
                        came.channel.send(encode(Broken("the group has all its ranks")))
                    came.channel.close()

    def _wrong(self, hello: Hello) -> str:
        """Why a rank cannot be part of the group; empty when it can."""
        settings, ours = self._settings, versions()
        if hello.world != settings.world or not 0 < hello.rank < settings.world:
            return f"tp: a rank {hello.rank} of {hello.world} came to a group of {settings.world}"
        if hello.backend != settings.backend:
            return f"tp_backend: rank {hello.rank} was started with {hello.backend}, rank 0 with {settings.backend}"
        for name, version in ours.items():
            if hello.versions.get(name) != version:
                return (
                    f"tp: rank {hello.rank} has {name} {hello.versions.get(name)}, rank 0 has {version}; "
                    "all ranks need the same versions"
                )
        for name in sorted({*settings.flags, *hello.flags}):
            theirs, our = hello.flags.get(name), settings.flags.get(name)
            if theirs != our:
                return f"{name}: rank {hello.rank} was started with {theirs}, rank 0 with {our}; all need the same"
        return ""

    def _admit(self) -> None:
        try:
            came = self._arrived.get(timeout=REMIND_SECONDS)
        except queue.Empty:
            missing = sorted(set(range(1, self.world)) - set(self._followers))
            log.warning("waiting for other ranks", extra=fields(missing=missing))
            return
        if isinstance(came, str):
            raise ModelError(came)
        if came.rank in self._followers:
            raise ModelError(f"tp: two processes say that they are rank {came.rank}")
        self._followers[came.rank] = came
        self._pulse.heard(came.rank)
        name = f"rank-{came.rank}"
        threading.Thread(target=self._listen_to, args=(came,), name=name, daemon=True).start()

    # --- telling ----------------------------------------------------------------------------------------------

    def tell(self, order: Order) -> None:
        """Have every other rank do it, too. Raises GroupBroken."""
        self._number += 1
        body, now = encode(Told(self._number, order)), time.monotonic()
        match order:
            case Arrive(request):
                self._offers[request.id] = {}
            case Begin(name) | SetAside(name):
                self._offers[name].clear()
            case Depart(name):
                self._offers.pop(name, None)
            case Close():
                self.close()
        for follower in self._followers.values():
            follower.asked = follower.asked or isinstance(order, Begin)
            if isinstance(order, Took):
                follower.unread.append((self._number, now))
            self._send(follower, body)

    def restorable(self, order: Begin) -> int:
        """Have all ranks begin a prompt, and wait for what they can restore. Raises GroupBroken."""
        self.tell(order)
        answers = [self._answer(follower, Restorable) for follower in self._followers.values()]
        if any(answer.name != order.name or not 0 <= answer.position <= order.position for answer in answers):
            raise GroupBroken(f"a rank answers something else than it was asked: {answers}")
        return min(answer.position for answer in answers)

    def deliver_to(self, deliver: Callable[[Offered], None]) -> None:
        """From where the engine thread takes its messages, so that it wakes up for an offer."""
        self._deliver = deliver

    def heard(self, offer: Offered) -> None:
        if offer.name in self._offers:
            self._offers[offer.name][offer.rank] = offer

    def ceiling(self, name: str) -> tuple[int | None, bool]:
        offers = self._offers.get(name, {})
        if len(offers) < len(self._followers):
            return 0, True  # somebody has not looked yet
        return min(offer.position for offer in offers.values()), any(offer.held for offer in offers.values())

    def close(self, reason: str = "") -> None:
        """From now on it is no failure that the others go. ``reason``: why they have to, where they have not been told
        to in order."""
        self._closing = True
        self._pulse.stop()
        for follower in self._followers.values() if reason else ():
            with contextlib.suppress(ChannelError, OSError):
                follower.channel.send(encode(Broken(reason)))

    def _say(self, message: FromLeader) -> None:
        for follower in self._followers.values():
            self._send(follower, encode(message))

    def _send(self, follower: Follower, body: bytes) -> None:
        try:
            follower.channel.send(body)
        except (ChannelError, OSError) as error:
            self._lost(follower.rank, f"nothing can be sent to it: {error}")

    def _beat(self) -> None:
        body, now = encode(Alive()), time.monotonic()
        for follower in list(self._followers.values()):
            self._send(follower, body)
            behind = 0.0
            with contextlib.suppress(IndexError):  # its thread may take the last one out at any moment
                behind = now - follower.unread[0][1]
            if behind > LAG * self._settings.silence_seconds and not self._closing:
                self._fail(f"rank {follower.rank} is {behind:.0f} s behind with what it has been told")

    # --- listening --------------------------------------------------------------------------------------------

    def _listen_to(self, follower: Follower) -> None:
        """Read what one follower says; its own thread."""
        try:
            while True:
                self._take(follower, self._next(follower.channel))
        except (ChannelError, OSError) as error:
            self._lost(follower.rank, str(error))

    def _next(self, channel: Channel) -> FromFollower:
        body = channel.receive()
        if body is None:
            raise ChannelError("its process is gone")
        return decode_from_follower(body)

    def _take(self, follower: Follower, message: FromFollower) -> None:
        self._pulse.heard(follower.rank)
        match message:
            case Alive():
                return
            case Offered():
                if message.rank != follower.rank or message.position < 0:
                    raise ChannelError(f"it offers {message.position} tokens as rank {message.rank}")
                self._deliver(message)
            case Done(number):
                if not follower.unread or follower.unread.popleft()[0] != number:
                    raise ChannelError(f"it says that order {number} is done, out of order")
            case Restorable() if not follower.asked:
                raise ChannelError("it answers what it was not asked")
            case Content() | Vote() | Reported() | Restorable():
                follower.asked = False
                follower.answers.put(message)
            case Broken(reason):
                raise ChannelError(reason)
            case Hello():
                raise ChannelError("it says hello twice")

    def _answer(self, follower: Follower, kind: type[Answer]) -> Answer:
        """What a follower answers. If it never does, its pulse ends, or the watchdog of the front end ends us."""
        answer = follower.answers.get()
        if not isinstance(answer, kind):
            self._fail(f"rank {follower.rank} answers with {type(answer).__name__} instead of {kind.__name__}")
        return answer

    def _silent(self, rank: int, seconds: float) -> None:
        self._lost(rank, f"it has not been heard of for {seconds:.0f} s")

    def _lost(self, rank: int, reason: str) -> None:
        if not self._closing:
            self._fail(f"rank {rank} is lost: {reason}")


def least_of(found: dict[int, RankReport]) -> RankReport:
    """What all ranks can do, by what each has found. Raises ModelError when they cannot go together."""
    ours = found[0]
    for rank, other in found.items():
        if other.layers != ours.layers or other.capabilities.slots != ours.capabilities.slots:
            raise ModelError(
                f"tp: rank {rank} would keep keys and values differently from rank 0: {other.layers[:1]} "
                f"{other.capabilities.reason!r} and {ours.layers[:1]} {ours.capabilities.reason!r}"
            )
    all_found = [each.capabilities for each in found.values()]
    least = replace(
        ours.capabilities,
        pipelined=all(each.pipelined for each in all_found),
        uncached=next((each.uncached for each in all_found if each.uncached), ""),
        together=all(each.together for each in all_found),
        forward_only=next((each.forward_only for each in all_found if each.forward_only), ""),
    )
    return RankReport(
        capabilities=least,
        limit_bytes=min(each.limit_bytes for each in found.values()),
        layers=ours.layers,
    )
