"""The folder where Millpond keeps what it made or fetched, and what happens where it cannot be used.

Findings (digests, probes, measurements) only save time: ``recalled`` and ``keep`` never raise, and without a folder
each start finds out anew. Converted models are needed: ``build_once`` says in one sentence which folder cannot be used,
why, and what to set.

A model's folder is filled under a temporary name and renamed when it is whole, so whatever has its final name is
complete. A lock per name keeps two processes from doing the same work; the kernel drops it when its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from millpond.hub.errors import SourceError
from millpond.hub.progress import Progress
from millpond.paths import expanded

FORMAT = 1
"""Raise it when the same source would be built into a different folder."""
VARIABLE = "MILLPOND_CACHE"
ELSEWHERE = f"{VARIABLE}=FOLDER names another folder"


class NoCache(Exception):  # noqa: N818 - it names a state, not a mistake
    """There is no folder to keep anything in; the message says why, and what to set."""


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """MILLPOND_CACHE, else XDG_CACHE_HOME/millpond, else ~/.cache/millpond. Not created here. Raises NoCache."""
    given, base = environ.get(VARIABLE), environ.get("XDG_CACHE_HOME")
    try:
        folder = expanded(given) if given else Path(base) / "millpond" if base else expanded("~/.cache/millpond")
        str(folder).encode()
    except UnicodeEncodeError:
        raise NoCache(f"the cache folder's name is not UTF-8 text; {ELSEWHERE}") from None
    except ValueError as error:
        raise NoCache(f"there is no cache folder, for {error}; {ELSEWHERE}") from None
    return folder


def prefix_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where cached prefixes are unless told otherwise. Raises NoCache."""
    return cache_root(environ) / "prefix"


def problem(environ: Mapping[str, str] = os.environ) -> str:
    """Why nothing can be kept, in one sentence; empty when it can."""
    try:
        folder = cache_root(environ)
    except NoCache as error:
        return str(error)
    why = unwritable(folder)
    return f"the cache folder {folder} cannot be written to: {why}; {ELSEWHERE}" if why else ""


def unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder, or to what exists above it; empty when it can. It is tried."""
    around = (folder.absolute(), *folder.absolute().parents)
    try:
        with tempfile.TemporaryFile(dir=next(path for path in around if os.path.lexists(path))) as file:
            file.write(b"millpond")
            file.flush()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def writable_by_others(folder: Path) -> bool:
    """Whether other accounts can put something into a folder, from which Millpond would then take it."""
    with suppress(OSError):
        return bool(folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return False


# --- findings -----------------------------------------------------------------------------------------------------


def recalled(name: str) -> bytes | None:
    """What was kept under a name, such as ``probes/x.json``; None when nothing, or it cannot be read."""
    try:
        return (cache_root() / name).read_bytes()
    except (OSError, NoCache):
        return None


def keep(name: str, content: bytes) -> None:
    """Keep it for the next start, if that can be; whoever reads it sees all of it or nothing."""
    with suppress(OSError, NoCache):
        path = cache_root() / name
        _make_private(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


# --- models -------------------------------------------------------------------------------------------------------


def build_once(name: str, build: Callable[[Path], None], progress: Progress) -> Path:
    """The folder ``name`` under the cache's models, filled by ``build`` when it is not there yet.

    ``build`` gets an empty folder; what it raises leaves nothing behind. Leftovers of a process that died are removed.
    Raises SourceError where the cache cannot be used, and whatever ``build`` raises but OSError.
    """
    try:
        models = cache_root() / "models"
    except NoCache as error:
        raise SourceError(f"the model has to be converted and kept, and {error}") from error
    try:
        return _built(models, name, build, progress)
    except OSError as error:
        about = f" ({error.filename})" if error.filename is not None else ""
        why = f"{error.strerror or type(error).__name__}{about}"
        raise SourceError(f"the converted model cannot be kept in {models}: {why}; {ELSEWHERE}") from error


def _built(models: Path, name: str, build: Callable[[Path], None], progress: Progress) -> Path:
    final = models / name
    if final.is_dir():
        return final
    _make_private(models)
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


def _make_private(folder: Path) -> None:
    """Make a folder and the missing ones above it, for this account alone."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    # A link that somebody has planted here is not followed.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"Waiting for another process that is preparing {path.name.removeprefix('.lock-')}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
