"""What ties a process to the one that started it: engine, ranks, and the server of ``millpond chat``.

On Linux the system kills it when its parent ends, whatever it is doing: loading, hanging in native code, stopped.
Everywhere the parent also holds the other end of a pipe or socket, and a thread that reads it ends the process when it
is closed. That covers a parent that was gone before the system could be asked, and systems that cannot be: a process
that is stopped, or never lets go of Python's lock, outlives its parent there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from typing import NoReturn

LOST_STATUS = 75
"""Exit status of a process that ends only because the one that it works for is gone or silent: somebody else failed
first."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on the system kills this process when its parent ends, even while it is stopped. Linux only; elsewhere
    nothing happens. Call it first thing, in the main thread, and then watch what the parent holds the other end of: the
    parent closes that before its end is told, so between the two none is missed. The parent must have started this
    process from a thread that lives as long as itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end_with(descriptor: int) -> None:
    """End this process, from a thread, when the other end of ``descriptor`` is closed. What arrives is thrown away."""
    threading.Thread(target=_watch, args=(descriptor,), name="lifeline", daemon=True).start()


def lost() -> NoReturn:
    """The end, at once and without clearing up: whoever would hear of it is gone. Any thread."""
    os._exit(LOST_STATUS)


def _watch(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):  # a buffered read would hold a lock that our own exit needs
            pass
    except OSError:  # torn down rather than closed: gone all the same
        pass
    lost()
