"""A client that sends any bytes at all and takes answers apart strictly: nothing that is not HTTP passes."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

PATIENCE = 60.0
"""Seconds without a byte after which a server counts as hanging."""
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) ([\x20-\x7e]*)")
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\x20-\x7e]*)")
CHUNK_SIZE = re.compile(rb"[0-9a-f]+")


class NotHttp(Exception):  # noqa: N818 - it says what was received
    """The server wrote something that is no HTTP response."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def error_code(self) -> str | None:
        """The code of an error in the one error shape. Raises AssertionError for any other shape."""
        assert self.headers["content-type"] == "application/json", self
        content = json.loads(self.body)
        assert set(content) == {"error"}, self
        error = content["error"]
        assert set(error) == {"message", "type", "param", "code"}, self
        assert isinstance(error["message"], str)
        assert error["message"]
        assert "Traceback" not in error["message"]
        code: str | None = error["code"]
        return code


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def send(connection: socket.socket, parts: Iterable[bytes]) -> None:
    """Send piece by piece. A server that has had enough and has closed the connection is no error."""
    try:
        for part in parts:
            connection.sendall(part)
    except (BrokenPipeError, ConnectionResetError):
        return


def receive(connection: socket.socket) -> bytes:
    """Everything until the server closes. A reset after what was received counts as closing."""
    received = bytearray()
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


def reset(connection: socket.socket) -> None:
    """Close with a RST instead of a FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def answers(received: bytes, methods: Iterable[str] = (), ended: bool = True) -> list[Answer]:
    """All responses in what was received, until the connection closed or (not ``ended``) so far. Raises NotHttp.

    ``methods`` are those of the requests, as far as known: an answer to HEAD has no body. Interim answers count too.
    """
    asked = iter(methods)
    found = []
    while received:
        status, headers, received = _head(received)
        method = next(asked, "GET") if status >= 200 else ""
        if status < 200 or status in (204, 304) or method == "HEAD":
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            if "content-length" in headers:
                raise NotHttp("both a length and chunks")
            body, received = _chunks(received)
        elif "content-length" in headers:
            length = int(headers["content-length"])
            if length > len(received):
                raise NotHttp(f"{length} bytes announced, {len(received)} sent")
            body, received = received[:length], received[length:]
        else:
            if headers.get("connection") != "close" or not ended:
                raise NotHttp("a body without an end")
            body, received = received, b""
        found.append(Answer(status, headers, body))
    return found


def _head(received: bytes) -> tuple[int, dict[str, str], bytes]:
    head, end, rest = received.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    status = STATUS_LINE.fullmatch(lines[0])
    if not end or status is None:
        raise NotHttp(received[:200])
    headers: dict[str, str] = {}
    for line in lines[1:]:
        header = HEADER.fullmatch(line)
        if header is None:
            raise NotHttp(line)
        name = header[1].decode().lower()
        if name in headers:
            raise NotHttp(f"{name} twice")
        headers[name] = header[2].decode()
    return int(status[1]), headers, rest


def _chunks(received: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        line, end, received = received.partition(b"\r\n")
        if not end or not CHUNK_SIZE.fullmatch(line):
            raise NotHttp(f"chunk size {line[:50]!r}")
        size = int(line, 16)
        if received[size : size + 2] != b"\r\n":
            raise NotHttp("a chunk without its end")
        body, received = body + received[:size], received[size + 2 :]
        if size == 0:
            return body, received
