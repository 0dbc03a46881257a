"""What ties a rank to the process that started it, and how its exit tells who was to blame."""

from __future__ import annotations

import ctypes
import signal
import sys

LOST_STATUS = 75
"""Exit status of a follower that ends only because rank 0 is gone or silent: somebody else failed first."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """From now on the system kills this process when its parent ends, even while it is stopped. Linux only; elsewhere
    nothing happens. Call it first thing, in the main thread, and then watch standard input, whose end covers a parent
    that was gone before. The parent must have started this process from a thread that lives as long as itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
