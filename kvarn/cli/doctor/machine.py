"""Memory and the limit of open files."""

from __future__ import annotations

import resource
from pathlib import Path

from kvarn.cli.doctor.finding import Finding, ok, shown, warn
from kvarn.config import ServeConfig
from kvarn.model.memory import total_memory

LEAST_FREE_BYTES = 2 * 2**30
SPARE_FILES = 128
"""Open files of the server beyond one for each connection."""
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def memory() -> Finding:
    """Free and total memory."""
    free, total = free_memory(), total_memory()
    if free is None:
        return ok("memory", f"{shown(total)} in all")
    text = f"{shown(free)} free of {shown(total)}"
    if free >= LEAST_FREE_BYTES:
        return ok("memory", text)
    return warn("memory", text, "close other programs, or serve a small model with a small --kv-memory-mb")


def free_memory() -> int | None:
    """Bytes that can be used without swapping, a container's limit counted; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # anything but Linux
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    left = [rest for limit, used in CGROUPS if (rest := _left(limit, used)) is not None]
    return min((*left, free) if free is not None else left, default=None)


def _left(limit: Path, used: Path) -> int | None:
    """What a container may still take; its file cache goes when it is needed, and is not counted as taken."""
    try:
        statistics = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
        cached = int(statistics.get("total_inactive_file") or statistics["inactive_file"])
        return max(0, int(limit.read_text()) - int(used.read_text()) + cached)
    except (OSError, ValueError, KeyError):  # no such controller, or "max"
        return None


def open_files(config: ServeConfig) -> Finding:
    """Whether all connections may be open at once; serve raises the soft limit by itself."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = config.max_connections + SPARE_FILES
    if hard == resource.RLIM_INFINITY or hard >= needed:
        limit = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
        return ok("files", f"{limit} may be open, {needed} are needed for {config.max_connections} connections")
    text = f"only {hard} may be open, {needed} are needed for {config.max_connections} connections"
    remedy = f"raise the hard limit ({hard}) in /etc/security/limits.conf or with LimitNOFILE, or a smaller "
    return warn("files", text, remedy + "--max-connections")
