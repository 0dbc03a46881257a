"""The folder where Kvarn keeps what it made or fetched, and how a finished folder gets into it.

A folder is filled under a temporary name and renamed when it is whole, so whatever has its final name is complete.
A lock per name keeps two processes from doing the same work; the kernel drops it when its holder dies.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kvarn.hub.progress import Progress

FORMAT = 1
"""Raise it when the same GGUF file would convert to a different folder."""


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """KVARN_CACHE, else XDG_CACHE_HOME/kvarn, else ~/.cache/kvarn. Not created here."""
    if given := environ.get("KVARN_CACHE"):
        return Path(given).expanduser()
    if base := environ.get("XDG_CACHE_HOME"):
        return Path(base) / "kvarn"
    return Path.home() / ".cache" / "kvarn"


def build_once(name: str, build: Callable[[Path], None], progress: Progress) -> Path:
    """The folder ``name`` under the cache's models, filled by ``build`` when it is not there yet.

    ``build`` gets an empty folder; what it raises passes through and leaves nothing behind. Leftovers of a process
    that died are removed.
    """
    models = cache_root() / "models"
    final = models / name
    if final.is_dir():
        return final
    models.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(models / f".lock-{name}", progress):
        if final.is_dir():
            return final
        for leftover in models.glob(f".tmp-{name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        working = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=models))
        try:
            build(working)
            working.rename(final)
        except BaseException:
            shutil.rmtree(working, ignore_errors=True)
            raise
    return final


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"Waiting for another process that is preparing {path.name.removeprefix('.lock-')}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
