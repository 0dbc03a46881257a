"""How much memory a call takes, whatever else this process does meanwhile.

What is traced is the whole process's: a thread that an earlier test left at work counts as well. It does not take as
much in every try, so the least of several is the call's own.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager

TRIES = 5


def traced(setting: Callable[[], AbstractContextManager[Callable[[], object]]]) -> tuple[int, int]:
    """Bytes that what a call returns holds, and the most that was held during the call.

    ``setting`` gives the call, ready to be made once; what it makes before and takes down after does not count.
    """
    held, most = [], []
    for _ in range(TRIES):
        with setting() as call:
            tracemalloc.start()
            try:
                made = call()
                now, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            del made
        held.append(now)
        most.append(peak)
    return min(held), min(most)
