"""A server to be shot at with raw bytes, the requests to do it with, and how to tell that it took no harm."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from raw_client import Answer, NotHttp, answers, connect, receive, send
from waiting import until

if TYPE_CHECKING:
    from conftest import Server

ASKED = {"model": "test-model", "prompt": "hi", "max_tokens": 4}
BODY = json.dumps(ASKED).encode()
LONG = json.dumps({**ASKED, "max_tokens": 500}).encode()
STREAM = json.dumps({**ASKED, "max_tokens": 500, "stream": True}).encode()
PATH = "/v1/completions"


def get(path: bytes, *headers: bytes, method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    lines = [method + b" " + path + b" " + version, b"Host: here.test", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def post(*headers: bytes, body: bytes = BODY, path: str = PATH) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return get(path.encode(), length, *headers, method=b"POST") + body


def framed(*headers: bytes, body: bytes = BODY) -> bytes:
    """A POST whose length is for the headers to say."""
    return get(PATH.encode(), *headers, method=b"POST") + body


def chunked(rest: bytes, *headers: bytes) -> bytes:
    return framed(b"Transfer-Encoding: chunked", *headers, body=rest)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Target:
    """The server under fire and what it had open before."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.port = urlsplit(server.url).port or 0
        self.ask()
        self.open_files = self.count_files()

    def ask(self) -> None:
        """An ordinary request with its right answer."""
        [answer] = self.exchange(post())
        assert answer.status == 200, answer
        assert json.loads(answer.body)["choices"][0]["text"] == "hihi"

    def requests(self) -> dict[str, int]:
        """The counters of /health."""
        [answer] = self.exchange(get(b"/health"))
        counters: dict[str, int] = json.loads(answer.body)["requests"]
        return counters

    def idle(self) -> dict[str, int]:
        """The counters once nothing runs and nothing holds a place."""
        return until(self.requests, lambda counters: not counters["running"] and not counters["held"])

    def count_files(self) -> int:
        return len(os.listdir(f"/proc/{self.server.process.pid}/fd"))  # noqa: PTH208 - names, not files to look at

    def exchange(self, data: bytes, count: int = 1, methods: tuple[str, ...] = ()) -> list[Answer]:
        """Send, wait for ``count`` answers or the end, close, and return all there were."""
        with connect(self.port) as connection:
            send(connection, [data])
            received = b""
            while not complete(received, count, methods):
                try:
                    more = connection.recv(65536)
                except ConnectionResetError:
                    more = b""
                if not more:
                    break
                received += more
            hang_up(connection)
            return checked(received + receive(connection), methods)

    def statuses(self, data: bytes, count: int = 1, methods: tuple[str, ...] = ()) -> list[int]:
        return [answer.status for answer in self.exchange(data, count, methods)]

    def check_steady(self) -> None:
        self.ask()
        counters = self.idle()
        assert counters["submitted"] == counters["finished"] + counters["failed"] + counters["cancelled"]
        assert counters["failed"] == 0
        until(self.count_files, lambda count: count <= self.open_files)
        assert not [line for line in self.server.lines if "Traceback" in line or " error " in line]


def complete(received: bytes, count: int, methods: tuple[str, ...]) -> bool:
    try:
        return len([answer for answer in answers(received, methods, ended=False) if answer.status >= 200]) >= count
    except NotHttp:
        return False  # not yet


def checked(received: bytes, methods: tuple[str, ...] = ()) -> list[Answer]:
    """What was received as answers, errors in their shape."""
    found = answers(received, methods)
    for answer, method in zip(found, (*methods, *["GET"] * len(found)), strict=False):
        if answer.status >= 400 and method != "HEAD":
            answer.error_code()
    return found


def hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        return  # the server was first
