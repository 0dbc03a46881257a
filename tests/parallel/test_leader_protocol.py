"""What a rank says that it should not: rank 0 gives a reason and ends the group, at once, whatever it was.

A real Leader hears a follower that the test speaks for, over the real channel. What comes in is only ever decoded:
nothing in it can be run.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import cast

import pytest
from engine_driver import request
from group_driver import PATIENCE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from rank_stage import BODIES, FOUND, WRONG, scene, threads_may_end

from millpond.engine.group import GroupBroken
from millpond.engine.orders import (
    Arrive,
    Begin,
    Offered,
    Took,
)
from millpond.parallel.backend import versions
from millpond.parallel.channel import Channel, ChannelError
from millpond.parallel.leader import Follower, least_of
from millpond.parallel.messages import (
    Alive,
    Broken,
    Done,
    FromFollower,
    Hello,
    Reported,
    Restorable,
    Told,
    Vote,
    decode_from_follower,
    decode_from_leader,
    encode,
)


@pytest.fixture(scope="module", autouse=True)
def _ending_threads() -> Iterator[None]:
    with threads_may_end():
        yield


@given(BODIES)
@settings(max_examples=500, deadline=None)
def test_bytes_are_a_message_or_a_channel_error(body: bytes) -> None:
    for decode in (decode_from_leader, decode_from_follower):
        with contextlib.suppress(ChannelError):
            message = decode(body)
            assert decode(encode(message)) == message


@pytest.mark.parametrize("what", WRONG)
def test_rank_0_ends_the_group_for_whatever_a_rank_should_not_say(what: str) -> None:
    body, expected = WRONG[what]
    with scene() as told:
        told.join().channel.send(body)
        reason = told.reason()
        assert reason.startswith("rank 1 is lost: ")
        assert expected in reason


@given(BODIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rank_0_outlives_no_bytes_of_a_rank_that_goes(body: bytes) -> None:
    """No thread of rank 0 dies of them and leaves the group as it was."""
    with scene() as told:
        told.join().channel.send(body)
        told.channel.close()
        assert told.reason().startswith("rank 1 is lost: ")


@given(st.binary(min_size=1, max_size=100))
@settings(max_examples=20, deadline=None)
def test_bytes_outside_a_frame_end_the_group(data: bytes) -> None:
    with scene() as told:
        told.join().channel._connection.sendall(data)  # who has taken a connection over knows no keys
        told.channel.close()
        assert told.reason().startswith("rank 1 is lost: ")


@pytest.mark.parametrize(
    ("hello", "expected"),
    [
        (Hello(2, 2, "ring", "", versions()), "tp: a rank 2 of 2 came to a group of 2"),
        (Hello(0, 2, "ring", "", versions()), "tp: a rank 0 of 2 came to a group of 2"),
        (Hello(-1, 2, "ring", "", versions()), "tp: a rank -1 of 2 came to a group of 2"),
        (Hello(1, 2**40, "ring", "", versions()), "came to a group of 2"),
        (Hello(1, 2, "jaccl", "", versions()), "tp_backend: rank 1 was started with jaccl, rank 0 with ring"),
        (Hello(1, 2, "ring", "", {**versions(), "mlx-lm": "0.1"}), "tp: rank 1 has mlx-lm 0.1, rank 0 has "),
        (Hello(1, 2, "ring", "", {}), "tp: rank 1 has millpond None, rank 0 has "),
        (Hello(1, 2, "ring", "", versions(), {"kv_bits": "8"}), "kv_bits: rank 1 was started with 8, rank 0 with None"),
    ],
    ids=["too high", "rank 0", "negative", "world", "backend", "version", "no versions", "flags"],
)
def test_who_is_not_what_it_should_be_is_told_and_ends_the_start(hello: Hello, expected: str) -> None:
    with scene() as told:
        told.say(hello)
        assert expected in told.reason()
        heard = told.heard()
        assert isinstance(heard, Broken)
        assert expected in heard.reason


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        (Reported(FOUND), "Vote"),
        (Vote(True), "Reported"),
        (Vote(True), "Restorable"),
    ],
)
def test_an_answer_to_another_question_ends_the_group(message: FromFollower, asked: str) -> None:
    with scene() as told:
        leader = told.join().leader
        leader.tell(Arrive(request("name", [1, 2], 3)))
        told.say(message)
        ask: dict[str, Callable[[], object]] = {
            "Vote": lambda: leader.unanimous(True),
            "Reported": lambda: leader.settle(FOUND),
            "Restorable": lambda: leader.restorable(Begin("name", 0)),
        }
        with pytest.raises(SystemExit):
            ask[asked]()
        assert f"instead of {asked}" in told.reason()


@pytest.mark.parametrize("answer", [Restorable("other", 0), Restorable("name", 65), Restorable("name", -1)])
def test_an_impossible_answer_to_a_begin_ends_the_group(answer: Restorable) -> None:
    with scene() as told:
        told.join()
        told.leader.tell(Arrive(request("name", [1, 2], 3)))
        found: queue.SimpleQueue[Exception] = queue.SimpleQueue()

        def begin() -> None:
            try:
                told.leader.restorable(Begin("name", 64))
            except GroupBroken as error:
                found.put(error)

        asking = threading.Thread(target=begin, daemon=True)
        asking.start()
        assert isinstance(told.heard(), Told)
        assert isinstance(told.heard(), Told)
        told.say(answer)
        assert "something else than it was asked" in str(found.get(timeout=PATIENCE))


def test_the_least_that_a_rank_can_restore_is_what_counts() -> None:
    with scene() as told:
        told.join().leader.tell(Arrive(request("name", [1, 2], 3)))
        told.say(Offered(1, "name", 128, False))
        told.leader.heard(told.offers.get(timeout=PATIENCE))
        assert told.leader.ceiling("name") == (128, False)
        found: queue.SimpleQueue[int] = queue.SimpleQueue()

        def begin() -> None:
            found.put(told.leader.restorable(Begin("name", 128)))

        for answer in (0, 64, 128):
            threading.Thread(target=begin, daemon=True).start()
            while True:
                message = told.heard()
                if isinstance(message, Told) and isinstance(message.order, Begin):
                    break
            told.say(Restorable("name", answer))
            assert found.get(timeout=PATIENCE) == answer
        assert told.leader.ceiling("name") == (0, True)  # after a Begin all have to look again


class Deaf:
    """The connection of a rank that takes what it is told."""

    def send(self, body: bytes) -> None:
        pass


def test_of_several_ranks_the_one_that_has_least_counts() -> None:
    with scene() as told:
        leader = told.join().leader
        leader._followers[2] = Follower(leader._followers[1].hello, cast(Channel, Deaf()))
        leader.tell(Arrive(request("name", [1, 2], 3)))
        leader.heard(Offered(2, "name", 64, True))
        assert leader.ceiling("name") == (0, True)
        leader.heard(Offered(1, "name", 128, False))
        assert leader.ceiling("name") == (64, True)
        for has in ((128, 64), (0, 128)):
            for follower, position in zip(leader._followers.values(), has, strict=True):
                follower.answers.put(Restorable("name", position))
            assert leader.restorable(Begin("name", 128)) == min(has)


def test_forwards_are_done_in_order_and_once() -> None:
    with scene() as told:
        told.join()
        for _ in range(3):
            told.leader.tell(Took(((1,),), (1,)))
        told.say(Done(1))
        told.say(Done(2))
        told.say(Done(2))
        assert "order 2 is done, out of order" in told.reason()


def test_an_offer_of_who_is_gone_is_forgotten() -> None:
    with scene() as told:
        told.join().say(Offered(1, "nobody", 2**62, False))
        told.leader.heard(told.offers.get(timeout=PATIENCE))
        assert told.leader.ceiling("nobody") == (0, True)
        assert told.reasons.empty()


def test_a_rank_that_falls_silent_is_given_up() -> None:
    with scene(silence=1.0) as told:
        told.join()
        assert "not been heard of" in told.reason()


def test_a_rank_that_reads_nothing_is_given_up_while_rank_0_waits_to_be_read() -> None:
    """Its machine is gone, and what it was being told fills every buffer: telling blocks, noticing does not."""
    with scene(silence=1.0) as told:
        told.join()

        over = threading.Event()

        def tell() -> None:
            while not over.is_set():
                with contextlib.suppress(SystemExit):
                    told.leader.tell(Arrive(request(secrets.token_hex(4), [100_000] * 500_000, 1)))

        threading.Thread(target=tell, daemon=True).start()
        reason = told.reason()
        over.set()
        assert "not been heard of" in reason


def test_a_rank_that_lives_but_does_nothing_is_given_up() -> None:
    with scene(silence=0.5) as told:
        told.join().leader.tell(Took(((1,),), (1,)))
        living = threading.Event()

        def live() -> None:
            with contextlib.suppress(OSError):
                while not living.wait(0.1):
                    told.say(Alive())

        threading.Thread(target=live, daemon=True).start()
        reason = told.reason()
        living.set()
        assert "behind with what it has been told" in reason


def test_who_comes_when_all_are_there_finds_the_door_closed() -> None:
    with scene() as told:
        told.join()
        with pytest.raises((OSError, ChannelError)):
            told.connected()
        assert told.reasons.empty()


def test_what_one_rank_cannot_do_none_does() -> None:
    other = structs.replace(FOUND.capabilities, forward_only="it cannot go back", pipelined=False, together=False)
    least = least_of({0: FOUND, 1: structs.replace(FOUND, capabilities=other, limit_bytes=5)})
    assert (least.capabilities.forward_only, least.limit_bytes) == ("it cannot go back", 5)
    assert (least.capabilities.pipelined, least.capabilities.together) == (False, False)
    assert least.capabilities.slots
