"""Runs programs of others with nothing of this process's environment and no way out of the machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

NOWHERE = "http://127.0.0.1:9"


def isolated(
    command: Sequence[str | Path], programs: Path, home: Path, work: Path, more: Mapping[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    """``programs``: the folder that is looked through first; ``work``: where it runs, made if it is missing; ``more``:
    further variables. Its errors are in what it prints."""
    work.mkdir(parents=True, exist_ok=True)
    own = {
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "LANG": "C.UTF-8",
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost"),
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE),
        **more,
    }
    return subprocess.run(
        command,
        cwd=work,
        env=own,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
