"""The channel between two ranks: what was sent arrives, and nothing else is taken for it, whoever sits in between."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from allocations import traced
from channel_middle import (
    GREETING,
    HEADER,
    PATIENCE,
    PROOF,
    SECRET,
    SIDES,
    STEPS,
    Middle,
    Side,
    assert_silent_about,
    connected,
    flipped,
    handshake_of,
    middle,
    other,
    started,
    tcp_pair,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.parallel.channel import MOST_BYTES, ChannelError

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


# --- streams that were touched ----------------------------------------------------------------------------------


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


def peak_of_a_refusal(side: Side, stream: bytes, why: str, *, ends: bool) -> int:
    """Most bytes held while a channel takes ``stream`` from ``side``, which ends there or goes on, and refuses it."""

    @contextlib.contextmanager
    def setting() -> Iterator[Callable[[], None]]:
        with middle() as between:
            between.handshake()
            receiver = between.channel(other(side))
            between.pass_on(side, stream)
            if ends:
                between.hang_up(side)

            def refused() -> None:
                with pytest.raises(ChannelError, match=why):
                    started(receiver.receive).result(PATIENCE)

            yield refused

    return traced(setting)[1]


@pytest.mark.parametrize("announced", [MOST_BYTES + 1, 2**31, 2**32 - 1])
def test_a_frame_too_large_is_refused_by_its_length_alone(side: Side, announced: int) -> None:
    """The stream goes on: to wait for what was announced would never end."""
    why = f"{announced} bytes announced; the largest allowed is {MOST_BYTES}"
    assert peak_of_a_refusal(side, announced.to_bytes(4, "big") + bytes(16), why, ends=False) < 1_000_000


def test_memory_follows_what_arrives_not_what_is_announced(side: Side) -> None:
    why = f"after 1000 of {MOST_BYTES} bytes of a body"
    stream = MOST_BYTES.to_bytes(4, "big") + bytes(16) + bytes(1000)
    assert peak_of_a_refusal(side, stream, why, ends=True) < 2_000_000


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
