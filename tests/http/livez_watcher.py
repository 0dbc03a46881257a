"""A process that asks a server's /livez every 20 ms: ``livez_watcher.py PORT PID``.

A line on its input makes it print how long the longest answer took since the last one, in seconds. It ends with its
input. It only needs what Python's start brings, so that its own work disturbs nobody.

Time in which the server did not run, because the machine had other things to do, is not the server's silence: no answer
counts for more than the processor time that the server took meanwhile, where that can be read (Linux).
"""

from __future__ import annotations

import select
import socket
import sys
import time
from pathlib import Path

EVERY = 0.02
ASK = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"


def worked(pid: str) -> float:
    """Seconds that all threads of a process have run so far; endless where nobody knows."""
    total = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        try:
            total += int(file.read_text().split()[0])
        except (OSError, IndexError):  # the thread has just ended
            continue
    return total / 1e9


def answered(connection: socket.socket, pid: str) -> float:
    """Seconds until the answer to one question was there."""
    begin, before = time.monotonic(), worked(pid)
    connection.sendall(ASK)
    received = b""
    while not received.endswith(b"}"):
        data = connection.recv(4096)
        if not data:
            raise ConnectionError(received.decode())
        received += data
    assert received.startswith(b"HTTP/1.1 200"), received
    took, work = time.monotonic() - begin, worked(pid) - before
    return min(took, work) if work else took


def main() -> None:
    connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    worst = 0.0
    due = time.monotonic()
    while True:
        worst = max(worst, answered(connection, sys.argv[2]))
        due = max(due + EVERY, time.monotonic())
        while select.select([0], [], [], max(0.0, due - time.monotonic()))[0]:
            if not sys.stdin.readline():
                return
            print(worst, flush=True)
            worst = 0.0


if __name__ == "__main__":
    main()
