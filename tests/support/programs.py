"""Programs and frameworks of others, as their makers publish them, each in a virtual environment of its own.

Fetched once from the package registry, of the versions that stand here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from isolated import isolated

from millpond.hub.cache import cache_root

OURS = tuple(f"{name}=={version(name)}" for name in ("mlx", "mlx-cpu", "mlx-lm"))
PACKAGES: dict[str, tuple[str, ...]] = {
    "langchain": ("langchain==1.5.2", "langchain-openai==1.7.4"),
    "agents_sdk": ("openai-agents==0.24.0",),
    "pydantic_ai": ("pydantic-ai-slim[openai,anthropic]==2.68.0",),
    "llm": ("llm==0.36",),
    "litellm": ("litellm==1.110.2",),
    "lm_eval": ("lm-eval[api]==0.4.13", *OURS),
}
INSTALL_SECONDS = 600
SECONDS = 600


class NotFetchedError(Exception):
    """The registry cannot be reached, or has nothing for this machine."""


@cache
def environment(name: str) -> Path:
    """The folder of a program's virtual environment; made the first time. Raises NotFetchedError."""
    packages = PACKAGES[name]
    digest = hashlib.sha256(" ".join((sys.version, *packages)).encode()).hexdigest()[:12]
    folder = cache_root() / "programs" / f"{name}-{digest}"
    if not (folder / "whole").exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "install", "-q", *packages],
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise NotFetchedError(f"{' and '.join(packages)} cannot be installed: {done.stderr.strip()[-300:]}")
        (folder / "whole").touch()
    return folder


def run(
    name: str, arguments: Sequence[str | Path], home: Path, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment, ``arguments[0]``, in a folder of its own, with nothing of this process's
    environment and no way out of the machine."""
    folder = environment(name) / "bin"
    return isolated([folder / arguments[0], *arguments[1:]], folder, home, home, more or {}, SECONDS)
