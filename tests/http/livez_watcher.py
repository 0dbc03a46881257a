"""A process that asks a server's /livez every 20 ms: ``livez_watcher.py PORT``.

A line on its input makes it print how long the longest answer took since the last one, in seconds. It ends with its
input. It only needs what Python's start brings, so that its own work disturbs nobody.
"""

from __future__ import annotations

import select
import socket
import sys
import time

EVERY = 0.02
ASK = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"


def answered(connection: socket.socket) -> float:
    """Seconds until the answer to one question was there."""
    begin = time.monotonic()
    connection.sendall(ASK)
    received = b""
    while not received.endswith(b"}"):
        data = connection.recv(4096)
        if not data:
            raise ConnectionError(received.decode())
        received += data
    assert received.startswith(b"HTTP/1.1 200"), received
    return time.monotonic() - begin


def main() -> None:
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    worst = 0.0
    due = time.monotonic()
    while True:
        worst = max(worst, answered(connection))
        due = max(due + EVERY, time.monotonic())
        while select.select([0], [], [], max(0.0, due - time.monotonic()))[0]:
            if not sys.stdin.readline():
                return
            print(worst, flush=True)
            worst = 0.0


if __name__ == "__main__":
    main()
