"""Memory and the limit of open files."""

from __future__ import annotations

import resource

from millpond.cli.doctor.finding import Finding, ok, shown, warn
from millpond.config import ServeConfig
from millpond.memory.machine import free_memory, total_memory

LEAST_FREE_BYTES = 2 * 2**30
SPARE_FILES = 128
"""Open files of the server beyond one for each connection."""


def memory() -> Finding:
    """Free and total memory."""
    free, total = free_memory(), total_memory()
    if free is None:
        return ok("memory", f"{shown(total)} in all")
    text = f"{shown(free)} free of {shown(total)}"
    if free >= LEAST_FREE_BYTES:
        return ok("memory", text)
    return warn("memory", text, "close other programs, or serve a small model with a small --kv-memory-mb")


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
