"""What a rank is told that it should not be: it gives a reason and goes, at once, whatever it was.

A real Rank and Worker are told what the test likes, over the real channel.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
from engine_driver import request
from group_driver import PATIENCE, RANK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_stage import BODIES, DIGEST, FOREVER, FOUND, START, WRONG, nested, stage, threads_may_end
from tiny_models import save

from millpond.engine.executor import Executor
from millpond.engine.group import Group, GroupBroken
from millpond.engine.orders import (
    Begin,
    Close,
    Decode,
    Depart,
    Fit,
    Launch,
    Order,
    Prefill,
    SetAside,
    Took,
)
from millpond.engine.prepare import Prepared, prepare
from millpond.lifeline import LOST_STATUS
from millpond.parallel.channel import Channel, ChannelError
from millpond.parallel.follower import Worker
from millpond.parallel.messages import (
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
    decode_from_leader,
    encode,
)
from millpond.types import GroupSettings, PrefillChunk
from millpond.wire import Start


@pytest.fixture(scope="module", autouse=True)
def _ending_threads() -> Iterator[None]:
    with threads_may_end():
        yield


@pytest.mark.parametrize(
    "body",
    [body for body, expected in WRONG.values() if expected == "undecodable" and b"Told" not in body]
    + [encode(Hello(1, 2, "ring", "", {})), encode(Done(1)), msgspec.msgpack.encode(["Told", 1, ["Trim"]])],
)
def test_a_rank_ends_for_whatever_rank_0_should_not_say(body: bytes) -> None:
    with stage() as told:
        told.channel.send(body)
        assert "undecodable" in told.reason()


@given(BODIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_rank_outlives_no_bytes_of_a_rank_0_that_goes(body: bytes) -> None:
    with stage() as told:
        told.channel.send(body)
        told.channel.close()
        closing = isinstance(_decoded(body), Told) and isinstance(_told(body), Close)
        if not closing:  # after that it may go
            assert told.reason()


def _decoded(body: bytes) -> FromLeader | None:
    with contextlib.suppress(ChannelError):
        return decode_from_leader(body)
    return None


def _told(body: bytes) -> Order | None:
    message = _decoded(body)
    return message.order if isinstance(message, Told) else None


def test_a_rank_0_that_falls_silent_is_given_up() -> None:
    with stage(silence=1.0) as told:
        told.say(Go())
        told.rank.join(DIGEST)
        assert "rank 0 has not been heard of" in told.reason()


@pytest.mark.parametrize("early", [Go(), VoteResult(True), Told(1, Fit(0))])
def test_a_start_out_of_order_is_refused(early: FromLeader) -> None:
    with stage() as told:
        told.say(early)
        with pytest.raises(GroupBroken, match="where Setup was expected"):
            told.rank.setup()


# --- and carries out orders -----------------------------------------------------------------------------------------


class Recorder(Group):
    """The other ranks of an executor: they can do everything, and what they are told is kept."""

    world = 2

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def tell(self, order: Order) -> None:
        self.orders.append(order)

    def restorable(self, order: Begin) -> int:
        self.orders.append(order)
        return order.position


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """What a rank loads when rank 0 has said what. Alone in its group of mlx.distributed, it has the whole model."""
    folder = save("llama", tmp_path_factory.mktemp("models") / "llama")
    start = Start(model_path=str(folder), max_batch=4, max_itl_ms=400.0)
    with stage() as told, pytest.MonkeyPatch.context() as patched:
        patched.setenv("MILLPOND_CACHE", str(tmp_path_factory.mktemp("cache")))

        def lead() -> None:
            while True:
                match told.heard():
                    case Content():
                        told.say(Go())
                    case Vote(yes):
                        told.say(VoteResult(yes))
                    case Reported(found):
                        told.say(Settled(found))
                        return

        leading = threading.Thread(target=lead, daemon=True)
        told.say(Setup(start, 1))
        assert told.rank.setup().start == start
        leading.start()
        made = prepare(start, folder, lambda _stage, _done: None, told.rank.inbox.put, told.rank)
        leading.join(PATIENCE)
    return made


@pytest.fixture(scope="module")
def orders(ready: Prepared) -> list[Order]:
    """What rank 0 tells while it answers two requests."""
    assert ready.mlx_group is not None
    recorder = Recorder()
    executor = Executor(ready, recorder)
    for name, tokens in (("a", [1, 2, 3, 4]), ("b", [9, 8, 7])):
        executor.arrive(request(name, tokens, 9))
        assert executor.begin(name, 0)
        chunk = PrefillChunk(name, 0, len(tokens) - 1, True)
        executor.read([chunk])
        executor.chunk_read(chunk)
    executor.fit(1 << 20)
    for drafts in ({}, {"a": [5], "b": [6, 7]}, {}):
        step = executor.decode(drafts, 0.0)
        executor.launch(step)
        drawn = step.drawn()
        for row in drawn:
            executor.sequences[row.name].commit(row.tokens[0])
        executor.took(step, tuple(tuple(row.tokens) for row in drawn), (1, 1))
    executor.set_aside("a")
    executor.depart("a")
    executor.depart("b")
    executor.close()
    return recorder.orders


def obeyed(ready: Prepared, numbered: Sequence[tuple[int, Order]]) -> list[FromFollower]:
    """What a rank says that is told this. Raises what ends it."""
    with stage() as told:
        told.say(*(Told(number, order) for number, order in numbered))
        told.say(Told(len(numbered) + 1, Close()))  # so that it comes to an end, whatever it was told
        Worker(told.rank, ready).run()
        told.rank._channel.close()
        said = []
        while (body := told.channel.receive()) is not None:
            said.append(decode_from_follower(body))
        return said


def numbered(told: Sequence[Order]) -> list[tuple[int, Order]]:
    return list(enumerate(told, 1))


def test_orders_are_obeyed(ready: Prepared, orders: list[Order]) -> None:
    said = [message for message in obeyed(ready, numbered(orders)) if isinstance(message, Done | Restorable)]
    took = [number for number, order in numbered(orders) if isinstance(order, Took)]
    assert said == [Restorable("a", 0), Restorable("b", 0), *map(Done, took)]


def test_a_rank_that_has_less_begins_nothing(ready: Prepared, orders: list[Order]) -> None:
    """A block may be gone between rank 0's plan and its order. The rank says what it has, and is told anew."""
    begin = first(orders, Begin)
    more = msgspec.structs.replace(orders[begin], position=64)
    asked = msgspec.structs.replace(orders[0], request=request("a", [1] * 100, 9))
    told = [
        asked,
        more,
        SetAside("a"),
        orders[begin],
        Prefill((PrefillChunk("a", 0, 99, True),)),
        SetAside("a"),
        Depart("a"),
    ]
    said = [message for message in obeyed(ready, numbered(told)) if isinstance(message, Done | Restorable)]
    assert said == [Restorable("a", 0), Restorable("a", 0)]


def test_a_skipped_or_repeated_number_is_refused(ready: Prepared, orders: list[Order]) -> None:
    told = numbered(orders)
    for wrong in (told[1:], told[:3] + told[4:], told[:4] + told[3:], [*told[:2], (2**62, Fit(0))], [(0, Fit(0))]):
        with pytest.raises(GroupBroken, match="came after order"):
            obeyed(ready, wrong)


@pytest.mark.parametrize("message", [Go(), VoteResult(True), Settled(FOUND), Setup(START, 1)])
def test_nothing_but_orders_comes_between_orders(ready: Prepared, message: FromLeader) -> None:
    with stage() as told:
        told.say(message)
        with pytest.raises(GroupBroken, match="between orders"):
            Worker(told.rank, ready).run()


def first(orders: Sequence[Order], kind: type[Order]) -> int:
    return next(place for place, order in enumerate(orders) if isinstance(order, kind))


def changed(orders: Sequence[Order], place: int, **fields: object) -> list[tuple[int, Order]]:
    return numbered([*orders[:place], msgspec.structs.replace(orders[place], **fields), *orders[place + 1 :]])


def test_another_state_or_other_tokens_are_noticed(ready: Prepared, orders: list[Order]) -> None:
    decode, took = first(orders, Decode), first(orders, Took)
    decoded, read = orders[decode], orders[took]
    assert isinstance(decoded, Decode)
    assert isinstance(read, Took)
    state, tokens = decoded.state, read.tokens
    with pytest.raises(GroupBroken, match="rank 0 is in state"):
        obeyed(ready, changed(orders, decode, state=state ^ 1))
    with pytest.raises(GroupBroken, match="rank 0 is in state"):
        obeyed(ready, changed(orders, decode, behind=True))
    for other in (((tokens[0][0] ^ 1,), tokens[1]), tokens[:1], (*tokens, (1,)), ((2**40,), tokens[1])):
        with pytest.raises(GroupBroken, match="rank 0 drew"):
            obeyed(ready, changed(orders, took, tokens=other))
    with pytest.raises(GroupBroken, match="rank 0 drew"):
        obeyed(ready, changed(orders, took, kept=(1,)))


@pytest.mark.parametrize(
    "order",
    [
        Begin("nobody", 0),
        Prefill((PrefillChunk("nobody", 0, 1, False),)),
        SetAside("nobody"),
        Depart("nobody"),
        Launch(),
        Took((), ()),
    ],
)
def test_orders_about_nobody_end_a_rank(ready: Prepared, order: Order) -> None:
    with pytest.raises((GroupBroken, KeyError, IndexError)):
        obeyed(ready, [(1, order)])


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_orders_that_are_lost_doubled_or_moved_never_draw_other_tokens(
    ready: Prepared, orders: list[Order], data: st.DataObject
) -> None:
    """With their numbers made good: then what follows does not fit, or nothing has changed. It always ends."""
    told = list(orders[:-1])
    place = data.draw(st.integers(0, len(told) - 1))
    order = told.pop(place)
    for _ in range(data.draw(st.integers(0, 2))):
        told.insert(data.draw(st.integers(0, len(told))), order)
    took = [number for number, order in numbered(told) if isinstance(order, Took)]
    try:
        said = obeyed(ready, numbered(told))
    except Exception:  # noqa: BLE001 - the model's code raises what it likes, and all of it ends the rank
        return
    assert [message for message in said if isinstance(message, Done)] == [Done(number) for number in took]


# --- real processes -------------------------------------------------------------------------------------------------


def test_a_rank_whose_rank_0_talks_nonsense_exits_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        given = GroupSettings(
            rank=1,
            world=2,
            backend="ring",
            host="127.0.0.1",
            port=listener.getsockname()[1],
            secret=secrets.token_hex(32),
            model=str(tmp_path),
            silence_seconds=FOREVER,
        )
        process = subprocess.Popen(RANK, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(given) + b"\n")
            process.stdin.flush()
            connection, _ = listener.accept()
            channel = Channel.accept(connection, bytes.fromhex(given.secret), PATIENCE)
            channel.send(nested(100_000))
            assert process.wait(PATIENCE) == LOST_STATUS
            # Its greeting, said by another thread, may come behind it.
            said = [decode_from_follower(body) for body in iter(channel.receive, None)]
            assert ["undecodable" in one.reason for one in said if isinstance(one, Broken)] == [True]
            assert process.stderr is not None
            assert b"undecodable" in process.stderr.read()
        finally:
            process.kill()
            process.communicate()
