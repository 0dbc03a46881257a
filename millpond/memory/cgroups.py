"""What the control groups of this process allow it: memory and CPUs (Linux).

A limit may be set on the process's own group (a service), on any group above it (a slice, a pod), and on the group that
a container takes for the root; the lowest counts. Where a group lies in the file system is told by /proc/self/cgroup,
its path within a hierarchy, and /proc/self/mountinfo, what part of that hierarchy is mounted where. Version 2, version
1 and both side by side are read alike: a hierarchy without the controller has no such files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class ControlGroups:
    """The folders of this process's groups and of those above them, in all hierarchies."""

    folders: tuple[Path, ...]

    @classmethod
    def own(cls, proc: Path = PROC) -> ControlGroups:
        """Of this process; none where the system has none."""
        try:
            groups = (proc / "cgroup").read_text(errors="surrogateescape").splitlines()
            mounts = (proc / "mountinfo").read_text(errors="surrogateescape").splitlines()
        except OSError:
            return cls(())
        return cls(tuple(folder for mount in _mounts(mounts) for folder in mount.folders(groups)))

    def memory_limit(self) -> int | None:
        """Bytes; None: no limit. Beyond ``memory.high`` nothing is killed, but everything is held up."""
        return min((limit for folder in self.folders for limit in _memory_limits(folder)), default=None)

    def memory_left(self) -> int | None:
        """Bytes that may still be taken; None: no limit. Cached files go when memory is needed: they do not count."""
        return min((left for folder in self.folders if (left := _left(folder)) is not None), default=None)

    def cpu_limit(self) -> float | None:
        """CPUs' worth of time, such as 1.5; None: no limit."""
        return min((share for folder in self.folders for share in _shares(folder)), default=None)


@dataclass(frozen=True)
class _Mount:
    """A hierarchy, or a part of it, in the file system."""

    options: frozenset[str] | None
    """Of version 1, the controllers among them; None: version 2."""
    root: PurePosixPath
    """What is mounted: a path within the hierarchy."""
    point: Path

    def folders(self, groups: Iterable[str]) -> Iterator[Path]:
        """Our group's folder and those above it, given the lines of /proc/self/cgroup."""
        for line in groups:
            _, listed, path = line.split(":", 2)
            if not (self.options >= set(listed.split(",")) if self.options is not None else not listed):
                continue
            # A path that is not below the root, or leads out of it, is not to be seen from here: the mount's root is
            # then the nearest that is.
            own = PurePosixPath(path)
            seen = own.is_relative_to(self.root) and ".." not in own.parts
            folder = self.point / own.relative_to(self.root) if seen else self.point
            yield folder
            yield from (above for above in folder.parents if above.is_relative_to(self.point))


def _mounts(lines: Iterable[str]) -> Iterator[_Mount]:
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(" ", 2)
        if kind not in ("cgroup", "cgroup2"):
            continue
        found = frozenset(options.split(",")) if kind == "cgroup" else None
        yield _Mount(found, PurePosixPath(_unescaped(fields[3])), Path(_unescaped(fields[4])))


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def _numbers(file: Path) -> list[int]:
    """All the numbers in a file; none when there is no such file."""
    try:
        return [int(word) for word in file.read_text().split() if word.isdecimal()]
    except OSError:
        return []


def _memory_limits(folder: Path) -> list[int]:
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    return [limit for name in names for limit in _numbers(folder / name)]


def _shares(folder: Path) -> Iterator[float]:
    match _numbers(folder / "cpu.max"):
        case [quota, period] if quota and period:
            yield quota / period
    match _numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us"):
        case [quota], [period] if quota and period:
            yield quota / period


def _left(folder: Path) -> int | None:
    limits = _memory_limits(folder)
    used = [*_numbers(folder / "memory.current"), *_numbers(folder / "memory.usage_in_bytes")]
    if not limits or not used:
        return None
    return max(0, min(limits) - max(used) + _cached(folder))


def _cached(folder: Path) -> int:
    try:
        pairs = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
        counted = {name: int(value) for name, value in pairs}
    except (OSError, ValueError):
        return 0
    return counted.get("total_inactive_file", counted.get("inactive_file", 0))
