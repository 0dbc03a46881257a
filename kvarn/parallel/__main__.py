"""``python -m kvarn.parallel``: one rank of a group. With ``--fd N`` rank 0, which serves the front end on an inherited
socket like any engine; without, another rank, whose GroupSettings come as a line of JSON on stdin. Stdin's end is that
of the process."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading

import msgspec

from kvarn.observe.log import configure
from kvarn.parallel.lifeline import die_with_parent
from kvarn.types import GroupSettings


def main() -> int:
    parser = argparse.ArgumentParser(prog="kvarn.parallel", description="Internal: started by the kvarn front end.")
    parser.add_argument("--fd", type=int, help="inherited socket to the front end, for rank 0")
    descriptor = parser.parse_args().fd
    configure(os.environ.get("KVARN_LOG_LEVEL", "info"), os.environ.get("KVARN_LOG_FORMAT", "text"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front end decides when we stop
    die_with_parent()
    from kvarn.parallel import process

    if descriptor is not None:
        return process.lead(socket.socket(fileno=descriptor))
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=GroupSettings)
    threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    return process.follow(settings)


def _end_with_stdin() -> None:
    """Whoever started us holds the other end; a collective that waits for a lost rank would outlive them."""
    while os.read(sys.stdin.fileno(), 1):  # a buffered read would hold a lock that our own exit needs
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
