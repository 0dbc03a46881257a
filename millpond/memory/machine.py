"""How much memory this machine, or the container we are in, really has."""

from __future__ import annotations

import os
from pathlib import Path

from millpond.memory.cgroups import ControlGroups


def total_memory() -> int:
    """Bytes of memory that this process may count on: the machine's, or less where control groups say so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = ControlGroups.own().memory_limit()
    return total if limit is None else min(total, limit)


def free_memory() -> int | None:
    """Bytes that can be used without swapping, control groups counted; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # anything but Linux
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    left = ControlGroups.own().memory_left()
    return min((amount for amount in (free, left) if amount is not None), default=None)
