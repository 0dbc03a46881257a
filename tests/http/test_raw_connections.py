"""Connections used in ways that no HTTP library would: requests in a row, clients that leave anywhere, random bytes.

As in test_raw_http.py, the server has taken no harm after each test.
"""

from __future__ import annotations

import json
import socket
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from raw_client import PATIENCE, NotHttp, connect, receive, reset, send
from raw_target import (
    ASKED,
    BODY,
    LONG,
    PATH,
    STREAM,
    Target,
    checked,
    chunk,
    chunked,
    complete,
    framed,
    get,
    hang_up,
    post,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


# --- several on one connection ------------------------------------------------------------------------------------

MIXED = (
    ("POST", post(), 200),
    ("GET", get(b"/livez"), 200),
    ("POST", post(body=b"{"), 400),
    ("GET", get(b"/nothing"), 404),
    ("HEAD", get(b"/health", method=b"HEAD"), 200),
    ("POST", chunked(chunk(BODY) + b"0\r\n\r\n"), 200),
    ("GET", get(PATH.encode()), 405),
    ("POST", post(body=json.dumps({**ASKED, "stream": True}).encode()), 200),
    ("POST", post(body=json.dumps({**ASKED, "max_tokens": -1}).encode()), 400),
    ("GET", get(b"/v1/models", b"Content-Length: 5") + b"12345", 200),
)


def test_pipelined_requests_are_answered_in_order(target: Target) -> None:
    many = MIXED * 20
    data = b"".join(
        request.replace(b"\r\n", b"\r\nX-Request-Id: number-%d\r\n" % number, 1)
        for number, (_, request, _) in enumerate(many)
    )
    methods = tuple(method for method, _, _ in many)
    found = target.exchange(data, len(many), methods)
    assert [answer.status for answer in found] == [status for _, _, status in many]
    assert [answer.headers["x-request-id"] for answer in found] == [f"number-{number}" for number in range(len(many))]
    whole = [json.loads(answer.body) for (_, request, _), answer in zip(many, found, strict=True) if request == post()]
    assert {answer["choices"][0]["text"] for answer in whole} == {"hihi"}


@pytest.mark.parametrize(
    "garbage", [b"\x00\xff\r\n\r\n", b"GET nothing\r\n\r\n", get(b"/livez", b"bad"), b"x" * 10_000 + b"\r\n\r\n"]
)
def test_garbage_after_good_requests(target: Target, garbage: bytes) -> None:
    data = b"".join(request for _, request, _ in MIXED)
    methods = tuple(method for method, _, _ in MIXED)
    found = target.exchange(data + garbage + data, len(MIXED) + 1, methods)
    expected = [status for _, _, status in MIXED]
    assert [answer.status for answer in found][: len(MIXED)] == expected
    assert [answer.status for answer in found][len(MIXED) :] in ([400], [])


def test_nothing_is_answered_after_a_connection_is_closed(target: Target) -> None:
    closing = get(b"/livez", b"Connection: close") + get(b"/livez") * 50
    assert target.statuses(closing, count=51) == [200]
    assert target.statuses(framed(b"Content-Length: 999999999999", body=b"") + get(b"/livez") * 50, count=51) == [413]


def test_byte_by_byte(target: Target) -> None:
    for request in (post(), chunked(chunk(BODY) + b"0\r\n\r\n")):
        with connect(target.port) as connection:
            send(connection, (request[at : at + 1] for at in range(len(request))))
            received = b""
            while not complete(received, 1, ()):
                received += connection.recv(65536)
            [answer] = checked(received)
            assert json.loads(answer.body)["choices"][0]["text"] == "hihi"


# --- clients that leave -------------------------------------------------------------------------------------------

LEAVINGS = ("close", "half", "reset")


def leave(connection: socket.socket, how: str, received: bytes = b"") -> None:
    """Go, in one of three ways, having received something perhaps."""
    if how == "reset":
        reset(connection)
    elif how == "half":
        hang_up(connection)
        checked_or_cut(received + receive(connection))


def checked_or_cut(received: bytes) -> None:
    """An answer may be cut where its client left, and one to a HEAD, of which nothing is known here, has no body."""
    try:
        checked(received)
    except NotHttp:
        assert received.startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("how", LEAVINGS)
@pytest.mark.parametrize("body", [LONG, STREAM], ids=["whole", "stream"])
def test_leaving_anywhere_in_a_request(target: Target, how: str, body: bytes) -> None:
    request = post(body=body)
    for cut in (*range(0, len(request), 9), len(request) - 1, len(request)):
        with connect(target.port) as connection:
            send(connection, [request[:cut]])
            leave(connection, how)


@pytest.mark.parametrize("how", LEAVINGS)
def test_leaving_in_the_middle_of_a_stream(target: Target, how: str) -> None:
    """The work stops with its client: requests are cancelled, not finished."""
    before = target.idle()
    for _ in range(10):
        with connect(target.port) as connection:
            send(connection, [post(body=STREAM)])
            received = connection.recv(100)
            assert received.startswith(b"HTTP/1.1 200 ")
            leave(connection, how, received)
    after = target.idle()
    assert after["cancelled"] == before["cancelled"] + 10
    assert after["finished"] == before["finished"]


@pytest.mark.parametrize("how", LEAVINGS)
def test_leaving_without_a_word(target: Target, how: str) -> None:
    for _ in range(100):
        with connect(target.port) as connection:
            leave(connection, how)


def test_leaving_with_requests_in_the_pipe(target: Target) -> None:
    for how in LEAVINGS:
        with connect(target.port) as connection:
            send(connection, [post(body=STREAM) * 50 + b"garbage"])
            received = connection.recv(100)
            assert received.startswith(b"HTTP/1.1 200 ")
            leave(connection, how, received)


def test_many_silent_connections(target: Target) -> None:
    """Two hundred clients that said a part of something are in nobody's way, and leave nothing behind."""
    silent = [connect(target.port) for _ in range(200)]
    for number, connection in enumerate(silent):
        send(connection, [post()[: number % len(post())]])
    target.ask()
    for connection in silent:
        connection.close()


# --- random bytes -------------------------------------------------------------------------------------------------

random_settings = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(data=st.binary(max_size=600))
@random_settings
def test_random_bytes(target: Target, data: bytes) -> None:
    with connect(target.port) as connection:
        send(connection, [data])
        hang_up(connection)
        assert {answer.status for answer in checked(receive(connection))} <= {400}


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A good request, or two, with a few bytes changed, lost, doubled or moved."""
    pool = [request for _, request, _ in MIXED]
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=2))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        to = draw(st.integers(at, min(len(data), at + 20)))
        match draw(st.sampled_from(["change", "lose", "double", "put"])):
            case "change":
                data[at] = draw(st.integers(0, 255))
            case "lose" if to - at < len(data):
                del data[at:to]
            case "double":
                data[at:at] = data[at:to] * draw(st.integers(1, 3))
            case _:
                data[at:at] = draw(
                    st.sampled_from([b"\r\n", b"\x00", b":", b" ", b"\n", b"\xff", b"Host: a\r\n", b"0"])
                )
    return bytes(data)


@given(data=mutations(), stay=st.booleans())
@example(data=post(), stay=True)
@random_settings
def test_mutated_requests(target: Target, data: bytes, stay: bool) -> None:
    """Whether the client stays for one answer or leaves at once."""
    with connect(target.port) as connection:
        send(connection, [data, b"\r\n\r\n", get(b"/livez", b"Connection: close")])
        if stay:
            connection.settimeout(0.2)  # a mutation may well announce a body that never comes
            try:
                received = connection.recv(65536)
            except (TimeoutError, ConnectionResetError):
                received = b""
            connection.settimeout(PATIENCE)
        else:
            received = b""
        hang_up(connection)
        checked_or_cut(received + receive(connection))
