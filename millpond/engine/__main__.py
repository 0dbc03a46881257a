"""``python -m millpond.engine --fd N``: the engine process, on an inherited connected socket."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys

from millpond.lifeline import die_with_parent
from millpond.observe.log import configure


def main() -> int:
    parser = argparse.ArgumentParser(prog="millpond.engine", description="Internal: started by the millpond front end.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front end")
    descriptor = parser.parse_args().fd
    die_with_parent()
    configure(os.environ.get("MILLPOND_LOG_LEVEL", "info"), os.environ.get("MILLPOND_LOG_FORMAT", "text"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front end decides when we stop
    from millpond.engine.process import serve

    return serve(socket.socket(fileno=descriptor))


if __name__ == "__main__":
    sys.exit(main())
