"""Handshakes that must fail: strangers, other secrets and versions, silence, and bytes that were touched."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from channel_middle import (
    GREETING,
    MAGIC,
    PATIENCE,
    PROOF,
    SECRET,
    SHORT,
    SIDES,
    Side,
    assert_silent_about,
    flipped,
    handshake_of,
    middle,
    other,
    started,
    taken,
    tcp_pair,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.parallel import channel
from millpond.parallel.channel import VERSION, Channel, ChannelError


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


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"mpond-tq" + bytes(36), SECRET * 3, bytes(100)])
def test_who_greets_otherwise_is_refused_without_waiting_for_more(side: Side, said: bytes) -> None:
    near, far = socket.socketpair()
    with far:
        far.sendall(said)
        with pytest.raises(ChannelError, match=f"not a {other(side)} of a Millpond group") as caught:
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
