"""A leader and a follower with us in between, for tests of the channel."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Literal, ParamSpec, TypeVar

import pytest

from millpond.parallel.channel import Channel, ChannelError

SECRET = b"a secret of thirty-two bytes, ok"
PATIENCE = 30.0
"""For what ends by itself at once; only a test that fails waits so long."""
SHORT = 0.3
"""For handshakes that must run out of time."""

# The format, written down once more: these tests also notice when it changes unasked.
MAGIC = b"mpond-tp"
GREETING = 8 + 4 + 32
PROOF = 32
HEADER = 4 + 16

T = TypeVar("T")
P = ParamSpec("P")
Side = Literal["follower", "leader"]
Edit = Callable[[Side, int, bytes], bytes]
"""What the one in the middle makes of bytes that ``Side`` sent, which begin at an offset of its stream."""

SIDES: tuple[Side, Side] = ("follower", "leader")
STEPS: tuple[tuple[Side, int, int], ...] = (
    ("follower", 0, GREETING),
    ("leader", 0, GREETING),
    ("follower", GREETING, PROOF),
    ("leader", GREETING, PROOF),
)


def unchanged(side: Side, offset: int, data: bytes) -> bytes:
    return data


def started(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call it in a thread that nobody waits for: what should end and does not is a failed test, not a hung one."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def flipped(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def taken(connection: socket.socket, count: int) -> bytes:
    """``count`` bytes, fewer at the end of the stream."""
    data = b""
    connection.settimeout(PATIENCE)
    with contextlib.suppress(ConnectionError):
        while len(data) < count and (piece := connection.recv(count - len(data))):
            data += piece
    return data


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near, _ = server.accept()
    return near, far


class Middle:
    """A leader and a follower who are connected to us in place of each other. Nothing moves unless we carry it."""

    def __init__(self, leaders: bytes, followers: bytes) -> None:
        leader, to_leader = socket.socketpair()
        follower, to_follower = socket.socketpair()
        self.wires: dict[Side, socket.socket] = {"leader": to_leader, "follower": to_follower}
        self.seen: dict[Side, bytes] = {"leader": b"", "follower": b""}
        """What each has sent, as it was."""
        self.ends: dict[Side, Future[Channel]] = {
            "leader": started(Channel.accept, leader, leaders, PATIENCE),
            "follower": started(Channel.connect, follower, followers, PATIENCE),
        }

    def handshake(self, edit: Edit = unchanged) -> None:
        """Carry it to its end, or until one side leaves."""
        for side, offset, count in STEPS:
            data = self.take(side, count)
            self.pass_on(side, edit(side, offset, data))
            if len(data) < count:
                self.hang_up(side)
                return

    def take(self, side: Side, count: int) -> bytes:
        data = taken(self.wires[side], count)
        self.seen[side] += data
        return data

    def pass_on(self, side: Side, data: bytes) -> None:
        """Give to the other what ``side`` has, or could have, said."""
        with contextlib.suppress(ConnectionError):
            self.wires[other(side)].sendall(data)

    def hang_up(self, side: Side) -> None:
        """To the other it looks as if ``side`` had closed."""
        with contextlib.suppress(OSError):
            self.wires[other(side)].shutdown(socket.SHUT_WR)

    def channel(self, side: Side) -> Channel:
        return self.ends[side].result(PATIENCE)

    def refusal(self, side: Side) -> str:
        with pytest.raises(ChannelError) as caught:
            self.ends[side].result(PATIENCE)
        return str(caught.value)

    def frames(self, side: Side, bodies: list[bytes]) -> list[bytes]:
        """Have ``side`` send the bodies; the frames stay here."""
        frames = []
        for body in bodies:
            self.channel(side).send(body)
            frames.append(self.take(side, HEADER + len(body)))
        return frames

    def received(self, side: Side) -> tuple[list[bytes], str]:
        """What the other end takes for sent by ``side``, up to the end: the bodies, then why it ended ("": orderly)."""
        self.hang_up(side)
        receiver = self.channel(other(side))
        bodies: list[bytes] = []  # the stream has an end, so this has one
        try:
            while (body := receiver.receive()) is not None:
                bodies.append(body)
        except ChannelError as error:
            return bodies, str(error)
        return bodies, ""

    def close(self) -> None:
        for wire in self.wires.values():
            wire.close()
        for end in self.ends.values():
            with contextlib.suppress(ChannelError):
                end.result(PATIENCE).close()


def other(side: Side) -> Side:
    return "leader" if side == "follower" else "follower"


@contextlib.contextmanager
def middle(leaders: bytes = SECRET, followers: bytes = SECRET) -> Iterator[Middle]:
    between = Middle(leaders, followers)
    try:
        yield between
    finally:
        between.close()


@contextlib.contextmanager
def connected(
    make: Callable[[], tuple[socket.socket, socket.socket]] = socket.socketpair,
) -> Iterator[tuple[Channel, Channel]]:
    """A leader's and a follower's channel with nothing in between."""
    near, far = make()
    accepting = started(Channel.accept, near, SECRET, PATIENCE)
    follower = Channel.connect(far, SECRET, PATIENCE)
    leader = accepting.result(PATIENCE)
    try:
        yield leader, follower
    finally:
        for connection in (near, far):  # wakes all threads, even where ``close`` does not
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        leader.close()
        follower.close()


def handshake_of(side: Side) -> Callable[[socket.socket, bytes, float], Channel]:
    return Channel.accept if side == "leader" else Channel.connect


def assert_silent_about(secret: bytes, error: BaseException | None) -> None:
    spellings = (secret.decode("latin-1"), repr(secret)[2:-1], secret.hex(), base64.b64encode(secret).decode())
    while error is not None:
        for spelling in spellings:
            assert spelling not in str(error)
            assert spelling not in repr(error)
        error = error.__cause__ or error.__context__
