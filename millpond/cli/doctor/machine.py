"""Memory and the limit of open files."""

from __future__ import annotations

import platform
import re
import resource
import subprocess
import sys
from pathlib import Path

from millpond.cli.doctor.finding import Finding, ok, shown, warn
from millpond.config import ServeConfig
from millpond.memory.machine import free_memory, total_memory

LEAST_FREE_BYTES = 2 * 2**30
CPUS = Path("/proc/cpuinfo")
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


def processor() -> str:
    """The CPU as its maker calls it; the architecture where that is not told."""
    try:
        if sys.platform == "darwin":
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        else:
            found = re.search(r"^model name\s*: (.+)$", CPUS.read_text(errors="replace"), re.MULTILINE)
            told = found[1].strip() if found else ""
    except OSError:
        told = ""
    return told or platform.machine()
