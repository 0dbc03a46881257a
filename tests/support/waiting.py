"""Waiting for what other processes do and tell nobody: asked again and again, but not for ever."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeVar

Answer = TypeVar("Answer")
PATIENCE = 120.0
"""Seconds after which something will not come true any more."""
PAUSE = 0.005
"""Seconds that are left to the others between two questions."""


def until(ask: Callable[[], Answer], right: Callable[[Answer], object] = bool, patience: float = PATIENCE) -> Answer:
    """The first answer that is right."""
    deadline = time.monotonic() + patience
    while not right(answer := ask()):
        assert time.monotonic() < deadline, answer
        time.sleep(PAUSE)
    return answer


async def eventually(
    ask: Callable[[], Answer], right: Callable[[Answer], object] = bool, patience: float = PATIENCE
) -> Answer:
    """The same, while the event loop goes on."""
    deadline = time.monotonic() + patience
    while not right(answer := ask()):
        assert time.monotonic() < deadline, answer
        await asyncio.sleep(PAUSE)
    return answer


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    """A test on an event loop of its own."""
    asyncio.run(asyncio.wait_for(test(), PATIENCE))


def alive(pid: int) -> bool:
    """False for a process that has ended; where /proc tells, also when nobody has looked yet."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc").is_dir()
    return state not in "ZX"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
