"""Bytes on a socket that no HTTP library would send: every answer is HTTP, errors have their shape, nothing is leaked.

One server takes all of it. After each test it answers an ordinary request, its counters add up, its log has no error,
and it has no more open files than before.
"""

from __future__ import annotations

import json
import sys

import pytest
from raw_client import answers, connect, receive, send
from raw_target import (
    ASKED,
    BODY,
    PATH,
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


# --- bodies in chunks ---------------------------------------------------------------------------------------------

REST = b"\r\n" + BODY + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "size",
    [b"", b"zz", b"-5", b"+5", b"0x5", b" 5", b"5 5", b"1_0", b"\x00", b"\xb2", b"f" * 21, b"g", b"5\n", b"9" * 20000],
)
def test_bad_chunk_sizes(target: Target, size: bytes) -> None:
    [answer] = target.exchange(chunked(size + REST))
    assert (answer.status, answer.error_code()) == (400, "bad_http")
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "rest",
    [
        b"5\r\nhelloworld\r\n0\r\n\r\n",
        chunk(BODY) + b"0\r\nno header\r\n\r\n",
        chunk(BODY) + b"0\r\na: \x00\r\n\r\n",
    ],
)
def test_bad_ends_of_chunks(target: Target, rest: bytes) -> None:
    assert set(target.statuses(chunked(rest))) <= {400}


def test_thousands_of_trailers(target: Target) -> None:
    trailers = b"a: b\r\n" * 20000
    assert set(target.statuses(chunked(chunk(BODY) + b"0\r\n" + trailers + b"\r\n"))) <= {200, 400}


@pytest.mark.parametrize(
    "rest",
    [
        chunk(BODY) + b"0\r\n\r\n",
        b"%X;name=value;x\r\n" % len(BODY) + BODY + b"\r\n0;last\r\n\r\n",
        chunk(BODY) + b"0\r\nTrailer: ignored\r\n\r\n",
        b"".join(chunk(BODY[at : at + 1]) for at in range(len(BODY))) + b"0\r\n\r\n",
    ],
)
def test_good_chunks(target: Target, rest: bytes) -> None:
    assert target.statuses(chunked(rest)) == [200]


# --- forged lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length",
    [b"-1", b"+5", b"5 5", b"0x10", b"", b"1e3", b"\xb2", b"5.0", b"5, 6", b"5;", b"\x00", b"9" * 30, b"9" * 5000],
)
def test_lengths_that_are_none(target: Target, length: bytes) -> None:
    [answer] = target.exchange(framed(b"Content-Length: " + length))
    assert answer.status in (400, 413)


def test_a_length_that_is_too_small(target: Target) -> None:
    """The body is cut there; what follows is read as the next request, which it is not."""
    [cut, *rest] = target.exchange(framed(b"Content-Length: 10") + b"\r\n\r\n", count=2)
    assert (cut.status, cut.error_code()) == (400, "invalid_json")
    assert [answer.status for answer in rest] == [400]


def test_a_length_that_is_too_large(target: Target) -> None:
    with connect(target.port) as connection:
        send(connection, [framed(b"Content-Length: %d" % (len(BODY) + 1))])
        hang_up(connection)
        assert {answer.status for answer in checked(receive(connection))} <= {400, 408}
    assert target.statuses(framed(b"Content-Length: 999999999999999")) == [413]


def test_two_lengths(target: Target) -> None:
    right = b"Content-Length: %d" % len(BODY)
    assert target.statuses(framed(right, b"Content-Length: 3")) == [400]
    assert target.statuses(framed(b"Content-Length: 3", right)) == [400]
    assert target.statuses(framed(right, right)) in ([200], [400])


@pytest.mark.parametrize("coding", [b"gzip", b"chunked, chunked", b"gzip, chunked", b"identity", b"xchunked", b"\xff"])
def test_codings_that_nobody_knows(target: Target, coding: bytes) -> None:
    coded = b"Transfer-Encoding: " + coding
    assert target.statuses(framed(coded, body=chunk(BODY) + b"0\r\n\r\n")) == [400]
    assert target.statuses(framed(coded, b"Content-Length: %d" % len(BODY))) == [400]


def test_a_length_beside_chunks(target: Target) -> None:
    """The chunks count (RFC 9112, 6.3): nothing after them can be smuggled in as a part of the body, or the reverse."""
    rest = chunk(BODY) + b"0\r\n\r\n"
    for length in (3, len(rest), 10**6):
        assert target.statuses(chunked(rest, b"Content-Length: %d" % length)) in ([200], [400])
    two = chunked(rest, b"Content-Length: 3") + get(b"/livez", b"Connection: close")
    assert target.statuses(two, count=2) in ([200, 200], [200], [400])


# --- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        b"No colon",
        b": no name",
        b"Na me: x",
        b"Na\x00me: x",
        b"N\xe4me: x",
        b"Name : x",
        b"Name: a\x00b",
        b"Name: a\rb",
        b"Host: twice.test",
        b"\x80: x",
    ],
)
def test_bad_headers(target: Target, head: bytes) -> None:
    [answer] = target.exchange(get(b"/livez", head))
    assert (answer.status, answer.error_code()) == (400, "bad_http")


@pytest.mark.parametrize(
    "name", ["Authorization", "X-Api-Key", "X-Request-Id", "Content-Type", "Cookie", "Connection", "Expect", "Origin"]
)
@pytest.mark.parametrize(
    "value", [b"\xff\xfe", b"Bearer \xe9", b"a\tb", b"", b" ", b",", b'"' * 200, b"\xf0\x9d\x95\x8f"]
)
def test_odd_values_are_borne(target: Target, name: str, value: bytes) -> None:
    header = name.encode() + b": " + value
    assert target.statuses(get(b"/livez", header)) == [200]
    assert target.statuses(post(header)) == ([403] if name == "Origin" and value.strip() else [200])


@pytest.mark.parametrize(
    "host", [b"", b"[", b"[::1", b"]", b"\xff", b"a b", b"a:b:c", b"x:99999999", b"@/?#", b"h" * 9000]
)
def test_odd_hosts_are_borne(target: Target, host: bytes) -> None:
    for path, status in ((b"/livez", 200), (b"/nothing", 404), (PATH.encode(), 405), (b"/v1/models/a%2Fb", 404)):
        request = b"GET " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"
        assert target.statuses(request) in ([status], [400])


def test_no_host(target: Target) -> None:
    assert target.statuses(b"GET /livez HTTP/1.1\r\n\r\n") == [400]
    assert target.statuses(b"GET /livez HTTP/1.0\r\n\r\n") == [200]


@pytest.mark.parametrize("size", [20_000, 200_000, 3_000_000])
def test_a_huge_header(target: Target, size: int) -> None:
    assert set(target.statuses(get(b"/livez", b"Name: " + b"x" * size))) <= {200, 400}
    assert set(target.statuses(get(b"/livez?" + b"x" * size))) <= {200, 400}
    assert set(target.statuses(b"G" * size)) <= {400}


def test_a_huge_head_is_not_kept(target: Target) -> None:
    """A head without an end gets its answer after a bounded number of bytes, however slowly they come."""
    with connect(target.port) as connection:
        send(connection, [b"GET /livez HTTP/1.1\r\nHost: here.test\r\n"])
        sent = 0
        connection.settimeout(0.001)
        received = b""
        while not received and sent < 10_000_000:
            send(connection, [b"Name: " + b"x" * 1000 + b"\r\n"])
            sent += 1000
            try:
                received = connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
        assert sent < 10_000_000


@pytest.mark.parametrize("count", [100, 5000, 50_000])
def test_thousands_of_headers(target: Target, count: int) -> None:
    headers = [b"Name-%d: x" % number for number in range(count)]
    assert set(target.statuses(get(b"/livez", *headers))) <= {200, 400}


@pytest.mark.parametrize(
    "path",
    [b"/liv\x00ez", b"/liv\xe4ez", b"/liv ez", b"", b"\xff\xff", b"/\x7f", b"/\x1b[31m"],
)
def test_bad_paths(target: Target, path: bytes) -> None:
    [answer] = target.exchange(get(path))
    assert (answer.status, answer.error_code()) == (400, "bad_http")


@pytest.mark.parametrize(
    "path",
    [
        b"/%00",
        b"/%ff%fe",
        b"/livez%00",
        b"/livez/",
        b"//",
        b"/../livez",
        b"/%2e%2e/etc/passwd",
        b"/v1/models/%00",
        b"/v1/models/%ff",
        b"/v1/models/",
        b"/v1/models//",
        b"/v1/models/../../x",
        b"/v1/models/" + b"x" * 5000,
        b"/%",
        b"/%zz",
        b"/[",
        b"/nothing?[",
        b"/\\",
        b"livez",
        b":",
        b"http:",
        b"//[",
    ],
)
def test_odd_paths(target: Target, path: bytes) -> None:
    [answer] = target.exchange(get(path))
    assert answer.status == 404
    assert answer.error_code() in ("not_found", "model_not_found")
    [answer] = target.exchange(get(path, method=b"POST"))
    assert answer.status in (404, 405)


def test_absolute_form(target: Target) -> None:
    """Only proxies are sent it. Whether it is understood or taken for an unknown path, the answer has its shape."""
    assert target.statuses(get(b"http://here.test/livez")) in ([200], [404])
    assert target.statuses(get(b"http://here.test/nothing")) == [404]
    assert target.statuses(get(b"http://[/livez")) in ([400], [404])


# --- versions and methods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opening",
    [
        b"GET /livez\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        b"GET /livez HTTP/1.10\r\nHost: here.test\r\n\r\n",
        b"GET /livez http/1.1\r\nHost: here.test\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\r\n\r\n" + bytes(500),
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"EHLO here.test\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n\r\n",
        b"\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b" GET /livez HTTP/1.1\r\nHost: here.test\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ],
)
def test_what_is_not_our_http(target: Target, opening: bytes) -> None:
    [answer, *rest] = target.exchange(opening)
    assert answer.status in (400, 404, 405, 505)
    assert {answer.status for answer in rest} <= {400}


def test_a_version_to_come(target: Target) -> None:
    """It is answered in the newest version there is here, or refused."""
    assert target.statuses(get(b"/livez", version=b"HTTP/1.9")) in ([200], [400])
    assert target.statuses(get(b"/livez", version=b"HTTP/9.9")) in ([200], [400], [505])


@pytest.mark.parametrize("opening", [b"\r\n", b"\r\n\r\n", b"\n"])
def test_empty_lines_first(target: Target, opening: bytes) -> None:
    assert target.statuses(opening + get(b"/livez")) in ([200], [400])


def test_line_ends_without_return(target: Target) -> None:
    assert target.statuses(get(b"/livez").replace(b"\r\n", b"\n")) in ([200], [400])


def test_http_1_0(target: Target) -> None:
    old = post(b"Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert target.statuses(old) == [200]
    short = json.dumps({**ASKED, "stream": True}).encode()
    [stream] = target.exchange(post(body=short).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert stream.status == 200
    assert "transfer-encoding" not in stream.headers
    assert stream.body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("method", ["CONNECT", "OPTIONS", "TRACE", "PUT", "DELETE", "PATCH", "get", "BREW", "X" * 200])
@pytest.mark.parametrize("path", [b"/livez", b"*", b"here.test:443", PATH.encode(), b"/nothing"])
def test_other_methods(target: Target, method: str, path: bytes) -> None:
    [answer] = target.exchange(get(path, method=method.encode()))
    assert answer.status in (404, 405)
    if answer.status == 405:
        assert answer.headers["allow"]


@pytest.mark.parametrize("path", [b"/livez", b"/readyz", b"/health", b"/v1/models", b"/openapi.json", b"/nothing"])
def test_head_has_no_body(target: Target, path: bytes) -> None:
    both = get(path, method=b"HEAD") + get(path)
    head, whole = target.exchange(both, count=2, methods=("HEAD", "GET"))
    assert head.status == whole.status
    assert head.headers["content-type"] == whole.headers["content-type"]


# --- waiting for permission, and other protocols ------------------------------------------------------------------


def test_expect_continue(target: Target) -> None:
    with connect(target.port) as connection:
        head, _, _ = post(b"Expect: 100-continue").partition(b"\r\n\r\n")
        send(connection, [head + b"\r\n\r\n"])
        interim = connection.recv(65536)
        assert [answer.status for answer in answers(interim)] == [100]
        send(connection, [BODY])
        rest = b""
        while not complete(rest, 1, ()):
            rest += connection.recv(65536)
        assert [answer.status for answer in checked(rest)] == [200]
    assert target.statuses(post(b"Expect: 100-continue")) in ([200], [100, 200])
    too_large = framed(b"Expect: 100-continue", b"Content-Length: 999999999999", body=b"")
    assert target.statuses(too_large) == [413]
    assert target.statuses(get(b"/livez", b"Expect: 100-continue")) == [200]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"\xff", b"TLS/1.2"])
def test_upgrades_are_not_taken(target: Target, protocol: bytes) -> None:
    upgrade = (
        b"Connection: Upgrade",
        b"Upgrade: " + protocol,
        b"Sec-WebSocket-Key: eA==",
        b"Sec-WebSocket-Version: 13",
    )
    assert target.statuses(get(b"/livez", *upgrade)) == [200]
    assert target.statuses(get(b"/nothing", *upgrade)) == [404]
    assert target.statuses(post(*upgrade)) == [200]
