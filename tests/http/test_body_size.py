"""Bodies that are too large, forged, endless or nonsense, and prompts that are too long: refused, in one shape."""

from __future__ import annotations

import gzip
import json
import sys
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from plain_http import port_of, until_closed
from raw_client import answers, connect, receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Server, StartServer

ASK: dict[str, object] = {"model": "test-model", "prompt": "ab", "max_tokens": 4}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def narrow(start_server: StartServer) -> Iterator[Server]:
    """A server that takes bodies of 2000 bytes, for half a second."""
    flags = ["body_timeout", "0.5", "max_body", "2000"]
    with start_server("plain", *flags) as server:
        yield server
        assert not [line for line in server.lines if "Traceback" in line or "unexpected" in line]


def body_of(size: int) -> bytes:
    bare = json.dumps({**ASK, "padding": ""}).encode()
    return json.dumps({**ASK, "padding": "x" * (size - len(bare))}).encode()


@pytest.mark.parametrize(("size", "status"), [(1999, 200), (2000, 200), (2001, 413), (15_000, 413), (200_000, 413)])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_limit_is_on_real_bytes(narrow: Server, size: int, status: int, chunked: bool) -> None:
    """(B7, J1)"""
    body = body_of(size)
    parts = iter([body[start : start + 500] for start in range(0, size, 500)])
    response = httpx.post(f"{narrow.url}/v1/completions", content=parts if chunked else body, verify=False)
    assert response.status_code == status
    if status == 413:
        error = response.json()["error"]
        assert (error["code"], error["type"]) == ("request_too_large", "invalid_request_error")
        assert "2000" in error["message"]


def test_the_limit_is_on_values(start_server: StartServer) -> None:
    """(B14) Whatever they are, and whether or not the field is known; a text full of commas is one value."""
    with start_server("plain", "max_values", "1000") as server:
        for field, value, status in (
            ("prompt", [5] * 1000, 413),
            ("junk", [[]] * 500, 413),
            ("junk", {str(number): 0 for number in range(500)}, 413),
            ("junk", [5] * 900, 200),
            ("junk", "[1,2]," * 1000, 200),
        ):
            response = httpx.post(f"{server.url}/v1/completions", json={**ASK, field: value}, verify=False)
            assert response.status_code == status, field
            if status == 413:
                error = response.json()["error"]
                assert error["code"] == "too_many_values"
                assert "1000" in error["message"]
                assert "max_values" in error["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "//v1/completions", "/v1//completions", "///v1///completions"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_slashes_and_byte_order_marks_too_many(server: Server, path: str, mark: bytes) -> None:
    """A base address may end with a slash; some programs begin every file with a mark."""
    content = mark + json.dumps(ASK).encode()
    response = httpx.post(server.url + path, content=content, verify=False)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip"])
def test_a_compressed_body_is_told_apart(server: Server, encoding: str) -> None:
    """(B4) It is no JSON, and the client should know why."""
    body = gzip.compress(json.dumps(ASK).encode())
    headers = {"content-encoding": encoding}
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers, verify=False)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (415, "content-encoding", "unsupported_encoding")
    assert encoding in error["message"]
    assert response.headers["accept-encoding"] == "identity"
    plain = {"content-encoding": "identity"}
    assert httpx.post(f"{server.url}/v1/completions", json=ASK, headers=plain, verify=False).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes_by_default(server: Server, chunked: bool) -> None:
    """(B7, L) The client has sent all of it and reads its 413."""
    parts = repeat(b"x" * 1_000_000, 10)
    response = httpx.post(
        f"{server.url}/v1/completions", content=iter(parts) if chunked else b"".join(parts), timeout=60
    )
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_beyond_the_limit_is_not_kept(server: Server) -> None:
    """(B7) Most of what may be read and thrown away: memory grows by a little more than what may be kept."""
    most = 8 << 20
    status = Path(f"/proc/{server.process.pid}/status")
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak counts anew from here

    def kilobytes(name: str) -> int:
        return int(status.read_text().partition(f"{name}:")[2].split()[0])

    before = kilobytes("VmRSS")
    parts = repeat(b"x" * 1_000_000, 60)
    response = httpx.post(f"{server.url}/v1/completions", content=iter(parts), timeout=60)
    assert response.status_code == 413
    assert (kilobytes("VmHWM") - before) * 1024 < 4 * most


def test_bytes_without_end_are_not_read_for_ever(narrow: Server) -> None:
    """(B7) A chunked body that never ends is cut off after a multiple of what is allowed, as soon as that came."""
    with connect(port_of(narrow)) as connection:
        send(
            connection,
            [HEAD + b"transfer-encoding: chunked\r\n\r\n", *repeat(b"1000\r\n" + b"x" * 4096 + b"\r\n", 2000)],
        )
        assert [answer.status for answer in answers(receive(connection))] in ([413], [])  # a reset may overtake it
    assert narrow.health()["requests"]["held"] == 0


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        # Shorter than what is sent: the rest is no request.
        (b'content-length: 10\r\n\r\n{"prompt": "a", "max_tokens": 1}\r\n\r\n', [400, 400]),
        # Both: the chunks count, and a length that lies beside them does not.
        (b"content-length: 4\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n2\r\n{}\r\n0\r\n\r\n", [400]),
        (b"content-length: 5, 5\r\nconnection: close\r\n\r\n12345", [400]),
        (b"content-length: 5\r\ncontent-length: 6\r\n\r\n12345", [400]),
        (b"content-length: -5\r\n\r\n", [400]),
        (b"content-length: +5\r\n\r\n", [400]),
        (b"content-length: 0x5\r\n\r\n", [400]),
        (b"content-length: 1e3\r\n\r\n", [400]),
        (b"content-length: \xb2\r\n\r\n", [400]),
        (b"content-length: " + b"9" * 5000 + b"\r\n\r\n", [400]),
        (b"content-length: " + b"9" * 19 + b"\r\nconnection: close\r\n\r\n", [413]),
        (b"transfer-encoding: gzip\r\n\r\n", [400]),
        (b"transfer-encoding: chunked\r\n\r\nfffffffffffffffffffffffff\r\n", [400]),
        (b"transfer-encoding: chunked\r\n\r\nno number\r\n", [400]),
        (b"transfer-encoding: chunked\r\n\r\n-1\r\n", [400]),
    ],
)
def test_forged_lengths(narrow: Server, sent: bytes, statuses: list[int]) -> None:
    """(B7, L)"""
    found = until_closed(narrow, HEAD + sent)
    assert [answer.status for answer in found] == statuses
    assert all(answer.error_code() for answer in found)
    assert narrow.process.poll() is None


def test_what_is_no_http_gets_the_error_shape(narrow: Server) -> None:
    """Among it the beginnings of TLS and of HTTP/2; the latter looks like a request, so that it gets two answers."""
    tls, http2 = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for sent in (tls, http2, b"GET\r\n\r\n", b"\r\n\r\n", b"\x00" * 100_000):
        answer = until_closed(narrow, sent)[-1]
        assert (answer.status, answer.error_code()) == (400, "bad_http")


@pytest.mark.parametrize(
    "body",
    [
        "[" * 2000,
        '{"prompt":' * 150,
        '{"prompt": "a", "max_tokens": ' + "9" * 1900 + "}",
        '{"prompt": "a", "seed": -' + "9" * 1900 + ".5}",
        '{"prompt": "a", "temperature": 1e999}',
        '{"prompt": "\\ud800", "max_tokens": 1, "model": 7}',
        '{"prompt": [[[[[[[[[1]]]]]]]]]}',
        '{"prompt": {"a": 1}}',
        '{"prompt": [1, "a", null]}',
        '{"prompt": [-1]}',
        '{"prompt": [99999999999999999999]}',
        '{"__proto__": {}, "prompt": ""}',
        '{"prompt": "a"} {"prompt": "b"}',
        "\x00",
        "\ufeff{}",
    ],
)
def test_hostile_json_is_a_400(narrow: Server, body: str) -> None:
    """(B4, L)"""
    response = httpx.post(f"{narrow.url}/v1/completions", content=body.encode())
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 5000


def test_numbers_of_many_digits_are_a_400(server: Server) -> None:
    """Python itself refuses to print them."""
    for digits in (4299, 4301, 100_000):
        body = f'{{"prompt": "a", "max_tokens": {"9" * digits}}}'
        response = httpx.post(f"{server.url}/v1/completions", content=body.encode())
        assert (response.status_code, set(response.json())) == (400, {"error"}), digits


def test_a_prompt_of_20000_tokens_where_512_fit(server: Server) -> None:
    """(L) As text, token ids and chat; the message says what there was and what is allowed."""
    asked: list[tuple[str, dict[str, object]]] = [
        ("completions", {"prompt": "x" * 20_000}),
        ("completions", {"prompt": [5] * 20_000}),
    ]
    asked.append(("chat/completions", {"messages": [{"role": "user", "content": "x" * 20_000}]}))
    for path, body in asked:
        response = httpx.post(f"{server.url}/v1/{path}", json={"model": "test-model", **body})
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "511 tokens" in error["message"]
