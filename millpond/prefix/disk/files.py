"""The only place where the SSD tier touches the file system. Every method is one step; all raise OSError.

A subclass can stop, slow down or fail any single step, which is how crashes and bad disks are tested.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

FOLDER_MODE = 0o700
FILE_MODE = 0o600


class FileInfo(NamedTuple):
    """One file of a folder. Size in bytes, time of the last change in seconds since 1970."""

    name: str
    size: int
    changed: float


class Space(NamedTuple):
    """Of a file system, in bytes: what this user may still write, and what is in use by anyone."""

    free: int
    used: int


class Files:
    """The real file system."""

    def make_folder(self, folder: Path) -> list[Path]:
        """Create a folder and the missing ones above it, private to the user; returns those created, topmost first."""
        missing = [folder, *folder.parents]
        del missing[next((i for i, path in enumerate(missing) if path.is_dir()), len(missing)) :]
        missing.reverse()
        for path in missing:
            path.mkdir(mode=FOLDER_MODE, exist_ok=True)
        return missing

    def is_private(self, folder: Path) -> bool:
        """Whether nobody else may look into a folder, or put anything there."""
        return not folder.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)

    def narrow(self, folder: Path) -> None:
        """Make a folder private if it is this user's, and none for everybody such as /tmp."""
        found = folder.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX:
            with suppress(OSError):  # a file system without modes
                folder.chmod(FOLDER_MODE)

    def is_link(self, path: Path) -> bool:
        return path.is_symlink()

    def names(self, folder: Path) -> list[str]:
        """Of everything in a folder."""
        return [path.name for path in folder.iterdir()]

    def create(self, path: Path) -> int:
        """A descriptor to write a new file that only the user can read. FileExistsError when there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write the beginning of ``data``; returns how many bytes were taken, which may be fewer."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Return when what was written is on the medium (on macOS fsync alone does not promise that)."""
        if sys.platform == "darwin":
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def publish(self, temporary: Path, final: Path) -> None:
        """Give a finished file its name, in place of one that has it."""
        temporary.replace(final)

    def sync_folder(self, folder: Path) -> None:
        """Return when the names in a folder are on the medium."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> bool:
        """Remove a file; False when there was none."""
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        return True

    def remove_empty(self, folder: Path) -> None:
        """Remove a folder if nothing is in it."""
        with suppress(OSError):
            folder.rmdir()

    def folders(self, folder: Path) -> list[str]:
        """Names of the folders in a folder; none when there is no such folder."""
        try:
            with os.scandir(folder) as found:
                return sorted(entry.name for entry in found if entry.is_dir(follow_symlinks=False))
        except FileNotFoundError:
            return []

    def listing(self, folder: Path) -> list[FileInfo]:
        """The files in a folder; none when there is no such folder."""
        infos: list[FileInfo] = []
        try:
            with os.scandir(folder) as found:
                for entry in found:
                    # Gone between listing and asking: another process removed it.
                    with suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False):
                            info = entry.stat(follow_symlinks=False)
                            infos.append(FileInfo(entry.name, info.st_size, info.st_mtime))
        except FileNotFoundError:
            return []
        return infos

    def space(self, folder: Path) -> Space:
        found = os.statvfs(folder)
        return Space(found.f_bavail * found.f_frsize, (found.f_blocks - found.f_bfree) * found.f_frsize)

    def writable(self, folder: Path) -> bool:
        """Whether files can be created in a folder, or in the nearest existing one above it."""
        nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)

    def identity(self, path: Path) -> tuple[int, int] | None:
        """Device and inode of a file, or None when it is not there: tells whether a name still means the same file."""
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_dev, found.st_ino

    def open(self, path: Path) -> int:
        """A descriptor to read a file. FileNotFoundError when there is none. Neither a link that somebody has planted
        is followed nor the writer of a pipe waited for."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    def size(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def read(self, descriptor: int, into: memoryview) -> int:
        """Fill the beginning of ``into`` from where the last read ended; 0 at the file's end."""
        return os.readv(descriptor, [into])

    @contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """Hold a lock between processes. BlockingIOError when another holds it; the kernel frees a dead one's."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(descriptor)

    def alive(self, pid: int) -> bool:
        """Whether a process of this number runs."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        return True

    def fill(self, descriptor: int, into: memoryview) -> int:
        """Read until ``into`` is full or the file ends; returns the bytes read."""
        done = 0
        while done < len(into) and (count := self.read(descriptor, into[done:])):
            done += count
        return done
