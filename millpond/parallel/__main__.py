"""``python -m millpond.parallel``: one rank of a group. With ``--fd N`` rank 0, which serves the front end on an
inherited socket like any engine; without, another rank, whose GroupSettings come as a line of JSON on stdin. Stdin's
end is that of the process."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys

import msgspec

from millpond.lifeline import die_with_parent, end_with
from millpond.observe.log import configure
from millpond.types import GroupSettings

_settings_decoder = msgspec.json.Decoder(GroupSettings)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="millpond.parallel", description="Internal: started by the millpond front end."
    )
    parser.add_argument("--fd", type=int, help="inherited socket to the front end, for rank 0")
    descriptor = parser.parse_args().fd
    die_with_parent()
    configure(os.environ.get("MILLPOND_LOG_LEVEL", "info"), os.environ.get("MILLPOND_LOG_FORMAT", "text"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front end decides when we stop
    from millpond.parallel import process

    if descriptor is not None:
        return process.lead(socket.socket(fileno=descriptor))
    settings = _settings_decoder.decode(sys.stdin.buffer.readline())
    end_with(sys.stdin.fileno())
    return process.follow(settings)


if __name__ == "__main__":
    sys.exit(main())
