"""The channel between two ranks: what was sent arrives, and nothing else is taken for it, whoever sits in between."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Literal, ParamSpec, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.parallel import channel
from kvarn.parallel.channel import MOST_BYTES, VERSION, Channel, ChannelError

SECRET = b"a secret of thirty-two bytes, ok"
PATIENCE = 30.0
"""For what ends by itself at once; only a test that fails waits so long."""
SHORT = 0.3
"""For handshakes that must run out of time."""

# The format, written down once more: these tests also notice when it changes unasked.
MAGIC = b"kvarn-tp"
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


@pytest.fixture
def tapped() -> Iterator[Middle]:
    """The handshake is done; frames pass through our hands."""
    with middle() as between:
        between.handshake()
        yield between


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> Side:
    return "leader" if request.param == "leader" else "follower"


def handshake_of(side: Side) -> Callable[[socket.socket, bytes, float], Channel]:
    return Channel.accept if side == "leader" else Channel.connect


# --- what is sent arrives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [socket.socketpair, tcp_pair])
def test_bodies_arrive_as_they_were_sent_in_both_directions(
    make: Callable[[], tuple[socket.socket, socket.socket]],
) -> None:
    with connected(make) as (leader, follower):

        @settings(deadline=None, max_examples=100)
        @given(st.lists(st.tuples(st.booleans(), st.binary(max_size=2000)), max_size=20))
        def check(messages: list[tuple[bool, bytes]]) -> None:
            for down, body in messages:
                (leader if down else follower).send(body)
            for down, body in messages:
                assert (follower if down else leader).receive() == body

        check()
        leader.close()
        assert follower.receive() is None


def test_a_stream_that_comes_byte_by_byte_is_the_same_stream(tapped: Middle, side: Side) -> None:
    bodies = [b"", b"one", b"x" * 300]
    receiver = tapped.channel(other(side))
    receiving = started(lambda: [receiver.receive() for _ in bodies])
    for byte in b"".join(tapped.frames(side, bodies)):
        tapped.pass_on(side, bytes([byte]))
    assert receiving.result(PATIENCE) == bodies


def test_a_handshake_that_comes_byte_by_byte_is_the_same_handshake() -> None:
    with middle() as between:
        for side, _, count in STEPS:
            for _ in range(count):
                between.pass_on(side, between.take(side, 1))
        between.channel("leader").send(b"there?")
        assert between.take("leader", HEADER + 6)[HEADER:] == b"there?"
        between.channel("follower")


def test_the_largest_body_passes_and_one_byte_more_is_refused_by_the_sender() -> None:
    largest = bytes(range(256)) * (MOST_BYTES // 256)
    with connected(tcp_pair) as (leader, follower):
        with pytest.raises(ChannelError, match=f"{MOST_BYTES + 1} bytes; the largest allowed is {MOST_BYTES}"):
            started(leader.send, largest + b"!").result(PATIENCE)
        receiving = started(follower.receive)
        started(leader.send, largest).result(PATIENCE)
        assert receiving.result(PATIENCE) == largest
        leader.send(b"goes on")
        assert follower.receive() == b"goes on"


def test_senders_at_once_do_not_mix_their_frames() -> None:
    threads, each = 8, 60
    # Larger than a socket's buffer in between: a sender blocks in the middle of its frame while others want to send.
    bodies = [[b"%d:%d:" % (who, i) + b"x" * (i * i * 97 % 70_000) for i in range(each)] for who in range(threads)]
    with connected(tcp_pair) as (leader, follower):

        def sends(mine: list[bytes]) -> None:
            for body in mine:
                leader.send(body)

        sending = [started(sends, mine) for mine in bodies]
        arrived: list[list[bytes]] = [[] for _ in range(threads)]
        for _ in range(threads * each):
            body = follower.receive()
            assert body is not None
            arrived[int(body.split(b":")[0])].append(body)
        for future in sending:
            future.result(PATIENCE)
    assert arrived == bodies


def test_the_socket_is_prompt_kept_alive_and_blocks_without_limit() -> None:
    made: list[socket.socket] = []

    def make() -> tuple[socket.socket, socket.socket]:
        made.extend(tcp_pair())
        return made[0], made[1]

    with connected(make):
        for connection in made:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert connection.gettimeout() is None
    assert [connection.fileno() for connection in made] == [-1, -1]


# --- closing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [socket.socketpair, tcp_pair])
def test_close_wakes_a_receiver_and_a_sender_that_are_blocked(
    make: Callable[[], tuple[socket.socket, socket.socket]],
) -> None:
    with connected(make) as (leader, _):
        sent = threading.Semaphore(0)

        def sends_until_it_breaks() -> None:
            while True:
                leader.send(bytes(MOST_BYTES))
                sent.release()

        receiving = started(leader.receive)
        sending = started(sends_until_it_breaks)
        assert not sent.acquire(timeout=0.2)  # nobody reads it: blocked
        assert not receiving.done()
        started(leader.close).result(PATIENCE)
        assert receiving.result(PATIENCE) is None
        with pytest.raises(OSError, match=r"."):
            sending.result(PATIENCE)


def test_after_close_nothing_is_sent_or_received_and_close_may_be_called_again() -> None:
    with connected() as (leader, follower):
        follower.send(b"too late")
        for _ in range(2):
            leader.close()
            assert leader.receive() is None
            with pytest.raises(OSError, match="closed on this side"):
                leader.send(b"x")


def test_many_may_close_at_once_while_others_send_and_receive() -> None:
    for _ in range(20):
        with connected() as (leader, follower):
            receiving = [started(leader.receive) for _ in range(2)]
            closing = [started(leader.close) for _ in range(4)]
            with contextlib.suppress(OSError):
                follower.send(b"x")
            for future in closing:
                future.result(PATIENCE)
            assert {future.result(PATIENCE) for future in receiving} <= {None, b"x"}


def test_a_peer_that_is_gone_is_an_os_error_for_the_sender() -> None:
    with connected(tcp_pair) as (leader, follower):
        follower.close()
        assert leader.receive() is None
        # The first may still be taken by the system, which then learns that nobody is there.
        with contextlib.suppress(OSError):
            leader.send(bytes(MOST_BYTES))
        with pytest.raises(OSError, match=r"."):
            leader.send(bytes(MOST_BYTES))


# --- handshakes that must fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("leaders", "followers"), [(b"s" * 32, b"S" * 32), (SECRET, SECRET[:-1]), (b"x", SECRET)])
def test_another_secret_is_refused_on_both_sides(leaders: bytes, followers: bytes) -> None:
    with middle(leaders, followers) as between:
        between.handshake()
        assert "follower's proof is wrong: its secret is another" in between.refusal("leader")
        assert "leader closed the connection" in between.refusal("follower")
        assert len(between.seen["leader"]) == GREETING, "the leader proved itself to a stranger"


def test_a_leader_without_the_secret_is_refused_too() -> None:
    with middle() as between:

        def forges(side: Side, offset: int, data: bytes) -> bytes:
            return b"\0" * len(data) if (side, offset) == ("leader", GREETING) else data

        between.handshake(forges)
        assert "leader's proof is wrong" in between.refusal("follower")


def test_another_version_is_refused_on_both_sides_in_words_that_name_both(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = tcp_pair()
    near.sendall(MAGIC + (VERSION + 1).to_bytes(4, "big") + bytes(32))
    with pytest.raises(ChannelError, match=f"leader speaks version {VERSION + 1} .*follower version {VERSION}"):
        Channel.connect(far, SECRET, PATIENCE)
    theirs = taken(near, GREETING + 1)
    near.close()
    assert len(theirs) == GREETING, "a proof for another version"
    near, far = tcp_pair()
    monkeypatch.setattr(channel, "VERSION", VERSION + 1)  # now we are the leader of the next version
    far.sendall(theirs)
    with pytest.raises(ChannelError, match=f"follower speaks version {VERSION} .*leader version {VERSION + 1}"):
        Channel.accept(near, SECRET, PATIENCE)
    assert taken(far, GREETING + 1)[8:12] == (VERSION + 1).to_bytes(4, "big")
    far.close()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"kvarn-tq" + bytes(36), SECRET * 3, bytes(100)])
def test_who_greets_otherwise_is_refused_without_waiting_for_more(side: Side, said: bytes) -> None:
    near, far = socket.socketpair()
    with far:
        far.sendall(said)
        with pytest.raises(ChannelError, match=f"not a {other(side)} of a Kvarn group") as caught:
            handshake_of(side)(near, SECRET, PATIENCE)
        assert near.fileno() == -1
        assert_silent_about(SECRET, caught.value)


@settings(deadline=None, max_examples=150)
@given(
    side=st.sampled_from(SIDES),
    start=st.sampled_from([b"", MAGIC, MAGIC + VERSION.to_bytes(4, "big")]),
    noise=st.binary(max_size=200),
)
def test_random_bytes_are_never_a_handshake(side: Side, start: bytes, noise: bytes) -> None:
    near, far = socket.socketpair()
    with far:
        far.sendall(start + noise)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(ChannelError):
            handshake_of(side)(near, SECRET, PATIENCE)
        said = taken(far, 1000)
        assert len(said) <= GREETING + (PROOF if side == "follower" else 0)


def test_a_peer_that_echoes_us_is_not_taken_for_a_rank(side: Side) -> None:
    near, far = socket.socketpair()
    with far:
        opening = started(handshake_of(side), near, SECRET, PATIENCE)
        far.sendall(taken(far, GREETING))
        # The leader waits for a proof; all that anyone can say without the secret is what was heard from it.
        far.sendall(taken(far, PROOF) if side == "follower" else bytes(PROOF))
        with pytest.raises(ChannelError, match="proof is wrong"):
            opening.result(PATIENCE)


def test_one_follower_cannot_lend_its_proof_to_another_session() -> None:
    with middle() as one, middle() as two:
        for between in (one, two):
            for side in SIDES:
                between.pass_on(side, between.take(side, GREETING))
        one.pass_on("follower", two.take("follower", PROOF))
        assert "proof is wrong" in one.refusal("leader")


@pytest.mark.parametrize("before", [0, 5, 8, 12, GREETING - 1, GREETING, GREETING + 7])
def test_a_peer_that_closes_in_the_handshake_is_an_error(side: Side, before: int) -> None:
    near, far = tcp_pair()
    opening = started(handshake_of(side), near, SECRET, PATIENCE)
    far.sendall((MAGIC + VERSION.to_bytes(4, "big") + bytes(64))[:before])
    far.close()
    with pytest.raises(ChannelError, match=f"{other(side)} closed the connection|connection broke"):
        opening.result(PATIENCE)
    assert near.fileno() == -1


@pytest.mark.parametrize("before", [0, 5, GREETING, GREETING + 7])
def test_a_peer_that_falls_silent_runs_out_of_time(side: Side, before: int) -> None:
    near, far = socket.socketpair()
    with far:
        far.sendall((MAGIC + VERSION.to_bytes(4, "big") + bytes(64))[:before])
        with pytest.raises(ChannelError, match=rf"no handshake with the {other(side)} within 0\.3 s"):
            handshake_of(side)(near, SECRET, SHORT)
    assert near.fileno() == -1


def test_a_peer_that_dribbles_runs_out_of_the_same_time(side: Side) -> None:
    near, far = socket.socketpair()
    over = threading.Event()

    def dribbles() -> None:
        # Each byte well within the limit, the greeting as a whole far beyond it.
        for byte in MAGIC + VERSION.to_bytes(4, "big") + bytes(64):
            if over.wait(SHORT / 6):
                return
            with contextlib.suppress(BrokenPipeError):
                far.sendall(bytes([byte]))

    with far:
        dribbling = started(dribbles)
        with pytest.raises(ChannelError, match=r"within 0\.3 s"):
            handshake_of(side)(near, SECRET, SHORT)
        over.set()
        dribbling.result(PATIENCE)


def test_a_peer_that_takes_nothing_runs_out_of_the_same_time(side: Side) -> None:
    near, far = socket.socketpair()
    near.setblocking(False)
    with far:
        for size in (65536, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    near.send(bytes(size))
        with pytest.raises(ChannelError, match=r"within 0\.3 s"):
            started(handshake_of(side), near, SECRET, SHORT).result(PATIENCE)


def test_no_time_left_or_no_secret_is_an_error_at_once(side: Side) -> None:
    for secret, seconds, words in ((SECRET, 0.0, "within 0 s"), (b"", PATIENCE, "secret is empty")):
        near, far = socket.socketpair()
        with far, pytest.raises(ChannelError, match=words):
            handshake_of(side)(near, secret, seconds)
        assert near.fileno() == -1


# --- streams that were touched ----------------------------------------------------------------------------------


def assert_flip_in_handshake_fails(side: Side, position: int, mask: int) -> None:
    def flips(whose: Side, offset: int, data: bytes) -> bytes:
        inside = whose == side and offset <= position < offset + len(data)
        return flipped(data, position - offset, mask) if inside else data

    with middle() as between:
        between.handshake(flips)
        between.refusal(other(side))  # who got the altered bytes always knows
        if side == "leader" and position >= GREETING:
            # The last message: the leader had been done, and finds nobody there.
            assert between.received("follower") == ([], "")
        else:
            between.refusal(side)


@pytest.mark.parametrize("position", range(GREETING + PROOF))
def test_a_flipped_bit_anywhere_in_the_handshake_ends_it(side: Side, position: int) -> None:
    assert_flip_in_handshake_fails(side, position, 1 << position % 8)


@settings(deadline=None, max_examples=60)
@given(side=st.sampled_from(SIDES), position=st.integers(0, GREETING + PROOF - 1), mask=st.integers(1, 255))
def test_any_altered_byte_in_the_handshake_ends_it(side: Side, position: int, mask: int) -> None:
    assert_flip_in_handshake_fails(side, position, mask)


BODIES = [b"first", b"", b"third body"]
FRAMES_BYTES = sum(HEADER + len(body) for body in BODIES)


def whole_frames(count: int) -> int:
    """How many of the BODIES are complete in the first ``count`` bytes."""
    complete = 0
    for body in BODIES:
        count -= HEADER + len(body)
        complete += count >= 0
    return complete


@pytest.mark.parametrize("position", range(FRAMES_BYTES))
def test_a_flipped_bit_anywhere_in_the_frames_ends_the_stream_there(side: Side, position: int) -> None:
    for bit in range(0, 8, 3):
        with middle() as between:
            between.handshake()
            frames = b"".join(between.frames(side, BODIES))
            between.pass_on(side, flipped(frames, position, 1 << bit))
            bodies, why = between.received(side)
            assert bodies == BODIES[: whole_frames(position)]
            assert "MAC is wrong" in why or "ended inside frame" in why or "announced" in why
            with pytest.raises(ChannelError) as again:
                between.channel(other(side)).receive()
            assert str(again.value) == why


@pytest.mark.parametrize("count", range(FRAMES_BYTES + 1))
def test_a_stream_cut_off_is_orderly_only_between_two_frames(tapped: Middle, side: Side, count: int) -> None:
    tapped.pass_on(side, b"".join(tapped.frames(side, BODIES))[:count])
    bodies, why = tapped.received(side)
    assert bodies == BODIES[: whole_frames(count)]
    between_frames = count in (0, 25, 45, FRAMES_BYTES)
    assert (why == "") == between_frames
    assert between_frames or f"the stream ended inside frame {len(bodies)}, after" in why


@settings(deadline=None, max_examples=150)
@given(
    side=st.sampled_from(SIDES),
    sent=st.lists(st.binary(max_size=30), min_size=1, max_size=6),
    kept=st.integers(0, 6),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 5)) | st.binary(max_size=40), max_size=6),
)
def test_whatever_is_made_of_a_stream_only_its_own_beginning_is_accepted(
    side: Side, sent: list[bytes], kept: int, moves: list[tuple[bool, int] | bytes]
) -> None:
    """Frames repeated, dropped, swapped, of the other direction, noise: only what is in its place is a frame."""
    with middle() as between:
        between.handshake()
        mine, foreign = between.frames(side, sent), between.frames(other(side), sent)
        stream = b"".join(mine[:kept])
        for move in moves:
            stream += move if isinstance(move, bytes) else (mine if move[0] else foreign)[move[1] % len(sent)]
        between.pass_on(side, stream)
        bodies, why = between.received(side)
        good = max(i for i in range(len(mine) + 1) if stream.startswith(b"".join(mine[:i])))
        assert bodies == sent[:good]
        assert (why == "") == (stream == b"".join(mine[:good]))


@pytest.mark.parametrize(
    ("order", "good"),
    [((0, 0), 1), ((0, 1, 1), 2), ((0, 1, 0), 2), ((1, 0), 0), ((0, 2, 1), 1), ((1, 2), 0), ((0, 2), 1)],
)
def test_frames_repeated_swapped_or_dropped(tapped: Middle, side: Side, order: tuple[int, ...], good: int) -> None:
    bodies = [b"same"] * 3  # the bodies are no help: only the place in the stream tells the frames apart
    frames = tapped.frames(side, bodies)
    assert len(set(frames)) == 3
    tapped.pass_on(side, b"".join(frames[i] for i in order))
    arrived, why = tapped.received(side)
    assert arrived == bodies[:good]
    assert f"frame {good} of 4 bytes is not what the peer sent here: its MAC is wrong" in why


def test_a_frame_thrown_back_at_its_sender_is_refused(tapped: Middle, side: Side) -> None:
    (frame,) = tapped.frames(side, [b"do it"])
    tapped.pass_on(other(side), frame)
    assert tapped.received(other(side)) == (
        [],
        "frame 0 of 5 bytes is not what the peer sent here: its MAC is wrong",
    )


def test_a_recorded_session_played_again_is_refused(tapped: Middle, side: Side) -> None:
    tapped.frames(side, [b"do it"])
    recorded = tapped.seen[side]
    near, far = socket.socketpair()
    with far:
        opening = started(handshake_of(other(side)), near, SECRET, PATIENCE)
        far.sendall(recorded)
        with pytest.raises(ChannelError, match=f"{side}'s proof is wrong"):
            opening.result(PATIENCE)


def test_frames_of_another_session_with_the_same_secret_are_refused(tapped: Middle, side: Side) -> None:
    with middle() as another:
        another.handshake()
        tapped.pass_on(side, another.frames(side, [b"do it"])[0])
    bodies, why = tapped.received(side)
    assert bodies == []
    assert "MAC is wrong" in why


# --- limits and silence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [MOST_BYTES + 1, 2**31, 2**32 - 1])
def test_a_frame_too_large_is_refused_by_its_length_alone(tapped: Middle, side: Side, announced: int) -> None:
    receiver = tapped.channel(other(side))
    tapped.pass_on(side, announced.to_bytes(4, "big") + bytes(16))
    tracemalloc.start()
    try:
        # The stream goes on: to wait for what was announced would never end.
        with pytest.raises(ChannelError, match=f"{announced} bytes announced; the largest allowed is {MOST_BYTES}"):
            started(receiver.receive).result(PATIENCE)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_memory_follows_what_arrives_not_what_is_announced(tapped: Middle, side: Side) -> None:
    receiver = tapped.channel(other(side))
    tapped.pass_on(side, MOST_BYTES.to_bytes(4, "big") + bytes(16) + bytes(1000))
    tapped.hang_up(side)
    tracemalloc.start()
    try:
        with pytest.raises(ChannelError, match=f"after 1000 of {MOST_BYTES} bytes of a body"):
            receiver.receive()
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def assert_silent_about(secret: bytes, error: BaseException | None) -> None:
    spellings = (secret.decode("latin-1"), repr(secret)[2:-1], secret.hex(), base64.b64encode(secret).decode())
    while error is not None:
        for spelling in spellings:
            assert spelling not in str(error)
            assert spelling not in repr(error)
        error = error.__cause__ or error.__context__


@settings(deadline=None, max_examples=60)
@given(
    secret=st.binary(min_size=8, max_size=40),
    side=st.sampled_from(SIDES),
    position=st.integers(0, GREETING + PROOF - 1),
    mask=st.integers(1, 255),
)
def test_no_error_tells_the_secret(secret: bytes, side: Side, position: int, mask: int) -> None:
    def flips(whose: Side, offset: int, data: bytes) -> bytes:
        inside = whose == side and offset <= position < offset + len(data)
        return flipped(data, position - offset, mask) if inside else data

    with middle(secret, secret) as between:
        between.handshake(flips)
        errors = [end.exception(PATIENCE) for end in between.ends.values()]
        assert any(errors)
        for error in errors:
            assert_silent_about(secret, error)
