"""The process of one rank from its settings to its exit.

As in millpond.engine.process, mlx is imported only after the BLAS has been prepared; and after the backend's
environment is in place.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, NoReturn

from millpond.engine.link import FrontEndLink
from millpond.engine.process import first_message
from millpond.lifeline import lost
from millpond.memory.allocator import keep_freed_memory
from millpond.model import blas
from millpond.observe.log import fields, last_words
from millpond.parallel.backend import set_environment
from millpond.types import GroupSettings
from millpond.wire import Fatal

if TYPE_CHECKING:
    from collections.abc import Callable

    import mlx.core as mx

log = logging.getLogger(__name__)


def lead(connection: socket.socket) -> int:
    """Rank 0: serve one front end over ``connection`` until it says Stop; returns the exit code. The process ends with
    it."""
    link = FrontEndLink(connection, lost)
    link.start()

    def fail(reason: str) -> NoReturn:
        log.error("the group is broken", extra=fields(reason=reason))
        link.send(Fatal(reason))
        link.close()
        last_words()
        os._exit(1)

    leader = None
    try:
        start = first_message(link)
        if start.group is None:
            raise ValueError("rank 0 was started without a group")
        keep_freed_memory()
        opener = _opener(start.group)
        library = blas.prepare()
        from msgspec.structs import replace

        from millpond.engine.boot import boot
        from millpond.parallel.leader import Leader

        leader = Leader(start.group, replace(start, group=None), opener, fail)
        leader.deliver_to(link.inbox.put)
        boot(start, library, link, leader).run()
    except Exception as error:
        log.exception("the group cannot go on")
        reason = str(error) or type(error).__name__
        link.send(Fatal(reason))
        if leader is not None:
            leader.close(reason)
        return 1
    finally:
        link.close()
    return 0


def follow(settings: GroupSettings) -> int:
    """Another rank, until told to go; returns the exit code."""
    keep_freed_memory()
    opener = _opener(settings)
    blas.prepare()
    from millpond.parallel.follower import serve

    return serve(settings, opener)


def _opener(settings: GroupSettings) -> Callable[[], mx.distributed.Group]:
    """What opens the group of mlx.distributed. Raises ModelError then."""
    files = set_environment(settings)

    def open_group() -> mx.distributed.Group:
        import mlx.core as mx

        from millpond.model.load import ModelError

        try:
            group = mx.distributed.init(strict=True, backend=settings.backend)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"tp_backend: {settings.backend} cannot be opened: {error}") from error
        finally:
            for file in files:
                file.unlink(missing_ok=True)
        if (group.rank(), group.size()) != (settings.rank, settings.world):
            raise ModelError(
                f"tp: rank {settings.rank} of {settings.world} was asked for, {settings.backend} made "
                f"rank {group.rank()} of {group.size()}"
            )
        return group

    return open_group
