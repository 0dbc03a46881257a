"""The engine process from its first message to its exit.

mlx is imported only after the BLAS has been prepared, which must come first (see model/blas.py).
"""

from __future__ import annotations

import logging
import socket

from millpond.engine.link import FrontEndLink
from millpond.lifeline import lost
from millpond.memory.allocator import keep_freed_memory
from millpond.model import blas
from millpond.wire import VERSION, Fatal, Start

log = logging.getLogger(__name__)


def serve(connection: socket.socket) -> int:
    """Serve one front end over ``connection`` until it says Stop; returns the exit code. The process ends with it."""
    link = FrontEndLink(connection, lost)
    link.start()
    try:
        keep_freed_memory()
        library = blas.prepare()
        from millpond.engine.boot import boot

        boot(first_message(link), library, link).run()
    except Exception as error:  # the last stop of the process: the front end must hear why before it goes
        log.exception("the engine cannot go on")
        link.send(Fatal(str(error) or type(error).__name__))
        return 1
    finally:
        link.close()
    return 0


def first_message(link: FrontEndLink) -> Start:
    """What the front end says first. Raises ValueError when that is something else."""
    start = link.inbox.get()
    if not isinstance(start, Start) or start.version != VERSION:
        raise ValueError(f"the first message must be a Start of version {VERSION}, got {type(start).__name__}")
    return start
