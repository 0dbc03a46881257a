"""A Leader that hears a follower for which the test speaks, and a Rank that hears such a rank 0, over real channels.

Where a rank would end its process, a thread of it ends by SystemExit.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import NoReturn

import mlx.core as mx
import msgspec
from engine_driver import request
from group_driver import PATIENCE
from hypothesis import strategies as st

from millpond.engine.group import RankReport
from millpond.engine.orders import (
    Arrive,
    Begin,
    Close,
    Decode,
    Fit,
    Offered,
    Order,
    Prefill,
    Took,
)
from millpond.model.load import ModelError
from millpond.model.probe import Capabilities
from millpond.parallel.backend import machine, versions
from millpond.parallel.channel import Channel
from millpond.parallel.follower import Rank
from millpond.parallel.leader import Leader
from millpond.parallel.messages import (
    Alive,
    Broken,
    Content,
    Done,
    FromFollower,
    FromLeader,
    Go,
    Hello,
    Restorable,
    Setup,
    Told,
    VoteResult,
    decode_from_follower,
    decode_from_leader,
    encode,
)
from millpond.types import GroupSettings, PrefillChunk
from millpond.wire import Start

FOREVER = 1000.0
"""Seconds of silence that are allowed: what is tested must be noticed by itself."""
DIGEST = "d" * 64
FOUND = RankReport(capabilities=Capabilities(True, "", "", True, ""), limit_bytes=1 << 20, layers=("kv",))
START = Start(model_path="somewhere", max_batch=4, max_itl_ms=400.0)

# --- bytes ----------------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """A message with a field that nobody knows, and lists in lists in it."""
    return b"\x82\xa4type\xa5Alive\xa1x" + b"\x91" * depth + b"\xc0"


ORDERS: tuple[Order, ...] = (
    Arrive(request("name", [1, 2, 3], 4, logit_bias={3: 1.0})),
    Begin("name", 64),
    Prefill((PrefillChunk("name", 0, 64, False),)),
    Decode(((1, 2), ()), True, 77),
    Took(((1, 2), (3,)), (2, 1), ("name",)),
    Fit(1 << 40),
    Close(),
)
SAID: tuple[FromLeader | FromFollower, ...] = (
    *(Told(number, order) for number, order in enumerate(ORDERS)),
    Hello(1, 2, "ring", "here", {"millpond": "1"}),
    Offered(1, "name", 64, True),
    Restorable("name", 64),
    VoteResult(True),
    Broken("because"),
)


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A message with a few bytes changed, or cut off."""
    body = bytearray(encode(draw(st.sampled_from(SAID))))
    for _ in range(draw(st.integers(0, 3))):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.integers(0, len(body)))])


BODIES = st.binary(max_size=200) | spoilt() | st.integers(1, 200_000).map(nested)


WRONG: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "undecodable"),
    "not msgpack": (b"\xc1", "undecodable"),
    "half a message": (encode(Hello(1, 2, "ring", "", {}))[:-3], "undecodable"),
    "more than a message": (encode(Alive()) + b"\x00", "undecodable"),
    "an unknown kind": (msgspec.msgpack.encode({"type": "Pickle", "code": "print"}), "undecodable"),
    "a message of rank 0": (encode(Told(1, Close())), "undecodable"),
    "another type of field": (msgspec.msgpack.encode({"type": "Done", "number": "1"}), "undecodable"),
    "a number beyond all": (msgspec.msgpack.encode({"type": "Done", "number": 2**64 - 1}), "out of order"),
    "no text": (b"\x82\xa4type\xa6Broken\xa6reason\xa2\xff\xfe", "undecodable"),
    "lists in lists": (nested(100_000), "undecodable"),
    "a list of four billion": (b"\x82\xa4type\xa4Done\xa6number\xdd\xff\xff\xff\xff", "undecodable"),
    "hello again": (encode(Hello(1, 2, "ring", "", {})), "hello twice"),
    "done with what was not told": (encode(Done(1)), "out of order"),
    "an answer to nothing": (encode(Restorable("name", 0)), "not asked"),
    "an offer of another rank": (encode(Offered(2, "name", 0, False)), "as rank 2"),
    "an offer of less than nothing": (encode(Offered(1, "name", -1, False)), "-1 tokens"),
    "its own end": (encode(Broken("no memory")), "no memory"),
}


# --- both ends ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads_may_end() -> Iterator[None]:
    """By SystemExit, as Python itself has it. pytest would report it, for which it formats a traceback in that very
    thread; and Python 3.11 cannot parse source in two threads at once."""
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not issubclass(raised.exc_type, SystemExit):
            before(raised)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


class Scene:
    """A Leader of a group of two, and the connection of the other rank, in the test's hands."""

    def __init__(self, silence: float = FOREVER) -> None:
        secret = secrets.token_hex(32)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.settings = GroupSettings(
            rank=0,
            world=2,
            backend="ring",
            host="127.0.0.1",
            port=self.port,
            secret=secret,
            model="",
            silence_seconds=silence,
            listen_fd=listener.detach(),
        )
        self.reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.offers: queue.SimpleQueue[Offered] = queue.SimpleQueue()
        self.leader = Leader(self.settings, START, mx.distributed.init, self._fail)
        self.leader.deliver_to(self.offers.put)
        self._joining = threading.Thread(target=self._join, daemon=True)
        self._joining.start()
        self.channel = self.connected()

    def connected(self) -> Channel:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        return Channel.connect(connection, bytes.fromhex(self.settings.secret), PATIENCE)

    def _fail(self, reason: str) -> NoReturn:
        self.reasons.put(reason)
        raise SystemExit  # ends this thread, as the whole process would end

    def _join(self) -> None:
        try:
            self.leader.join(DIGEST)
        except ModelError as error:
            self.reasons.put(str(error))

    def say(self, message: FromFollower) -> None:
        self.channel.send(encode(message))

    def heard(self) -> FromLeader:
        """What rank 0 says next, but for signs of life."""
        while (body := self.channel.receive()) is not None:
            message = decode_from_leader(body)
            if not isinstance(message, Alive):
                return message
        raise AssertionError("rank 0 has closed the connection")

    def join(self) -> Scene:
        self.say(Hello(1, 2, "ring", machine(), versions()))
        assert isinstance(self.heard(), Setup)
        self.say(Content(DIGEST))
        assert isinstance(self.heard(), Go)
        self._joining.join(PATIENCE)
        return self

    def reason(self) -> str:
        return self.reasons.get(timeout=PATIENCE)

    def close(self) -> None:
        self.channel.close()  # first: rank 0 may be waiting for it to read
        self.leader.close("over")


@contextlib.contextmanager
def scene(silence: float = FOREVER) -> Iterator[Scene]:
    made = Scene(silence)
    try:
        yield made
    finally:
        made.close()


class Listening(Rank):
    """A rank whose end ends only a thread."""

    def __init__(self, given: GroupSettings) -> None:
        self.reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
        super().__init__(given, mx.distributed.init)

    def fail(self, reason: str, status: int = 1) -> NoReturn:
        self.reasons.put(reason)
        raise SystemExit


class Stage:
    """A Rank, and rank 0's end of its connection, in the test's hands."""

    def __init__(self, silence: float = FOREVER) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            given = GroupSettings(
                rank=1,
                world=2,
                backend="ring",
                host="127.0.0.1",
                port=listener.getsockname()[1],
                secret=secrets.token_hex(32),
                model="",
                silence_seconds=silence,
            )
            accepted: queue.SimpleQueue[Channel] = queue.SimpleQueue()

            def accept() -> None:
                connection, _ = listener.accept()
                accepted.put(Channel.accept(connection, bytes.fromhex(given.secret), PATIENCE))

            threading.Thread(target=accept, daemon=True).start()
            self.rank = Listening(given)
            self.channel = accepted.get(timeout=PATIENCE)
        assert isinstance(self.heard(), Hello)

    def say(self, *messages: FromLeader) -> None:
        for message in messages:
            self.channel.send(encode(message))

    def heard(self) -> FromFollower:
        while (body := self.channel.receive()) is not None:
            message = decode_from_follower(body)
            if not isinstance(message, Alive):
                return message
        raise AssertionError("the rank has closed the connection")

    def reason(self) -> str:
        return self.rank.reasons.get(timeout=PATIENCE)


@contextlib.contextmanager
def stage(silence: float = FOREVER) -> Iterator[Stage]:
    made = Stage(silence)
    try:
        yield made
    finally:
        made.rank.close()
        made.channel.close()
