"""Single requests, byte by byte, and what a server says to them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from raw_client import Answer, NotHttp, answers, connect, receive, send

if TYPE_CHECKING:
    from conftest import Server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def port_of(server: Server) -> int:
    return int(urlsplit(server.url).port or 0)


def one_answer(server: Server, *parts: bytes) -> Answer:
    """What the server says to these bytes, on a connection of their own."""
    connection = connect(port_of(server))
    with connection:
        send(connection, parts)
        received = bytearray()
        while True:
            data = connection.recv(65536)
            received += data
            try:
                found = [answer for answer in answers(bytes(received)) if answer.status >= 200]
            except NotHttp:
                found = []
            if found or not data:
                assert found, bytes(received)
                return found[0]


def get(server: Server, path: str = "/v1/models", *headers: bytes, host: bytes = b"localhost") -> Answer:
    head = b"\r\n".join([f"GET {path} HTTP/1.1".encode(), b"host: " + host, *headers])
    return one_answer(server, head + b"\r\n\r\n")


def until_closed(server: Server, *parts: bytes) -> list[Answer]:
    """All that the server says to these bytes until it closes the connection by itself."""
    with connect(port_of(server)) as connection:
        send(connection, parts)
        return answers(receive(connection))
