"""The folders that Kvarn writes to: is there room, may it write, and what kind of disk is it?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvarn.cli.doctor.finding import Finding, fail, ok, shown, warn
from kvarn.config import ServeConfig
from kvarn.hub.cache import cache_root
from kvarn.prefix.disk import upkeep

LEAST_FREE_BYTES = 2 * 2**30
NETWORK = re.compile(
    r"nfs4?|cifs|smb.*|afpfs|webdav|davfs.*|9p|ceph|lustre|gpfs|beegfs|afs|fuse\.(sshfs|glusterfs|.*nfs)"
)
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class Place:
    """A folder, or where it would be made."""

    folder: Path
    free: int
    kind: str
    """Type of the file system; empty where it is not known."""
    error: str
    """Why nothing can be written; empty when it can."""

    @property
    def text(self) -> str:
        kind = f", {self.kind}" if self.kind else ""
        return f"{self.folder}: {self.error or f'{shown(self.free)} free{kind}'}"


def caches() -> Iterator[Finding]:
    """The folder of what Kvarn makes, and the one of the models of the hub."""
    yield _cache("cache", cache_root(), "KVARN_CACHE", fail)
    from huggingface_hub.constants import HF_HUB_CACHE  # what it reads from the environment

    # What was fetched before is served all the same.
    yield _cache("hub", Path(HF_HUB_CACHE), "HF_HUB_CACHE", warn)


def _cache(subject: str, folder: Path, variable: str, unwritable: Callable[[str, str, str], Finding]) -> Finding:
    place = look(folder)
    elsewhere = f"{variable}=FOLDER names another one"
    if place.error:
        return unwritable(subject, place.text, f"let this account write there; {elsewhere}")
    if place.free < LEAST_FREE_BYTES:
        return warn(subject, place.text, f"make room for models; {elsewhere}")
    if NETWORK.fullmatch(place.kind):
        return warn(subject, f"{place.text}: models load slowly over a network", f"{elsewhere}, on a local disk")
    return ok(subject, place.text)


def ssd(config: ServeConfig) -> Finding:
    """The SSD tier of the prefix cache."""
    if config.cache_ram == 0 or config.cache_ssd == 0:
        return ok("SSD tier", f"off: {'cache_ram' if config.cache_ram == 0 else 'cache_ssd'} is 0")
    place = look(config.cache_folder)
    elsewhere = "--cache-dir FOLDER names another folder"
    if place.error:
        return fail("SSD tier", place.text, f"let this account write there; {elsewhere}; --cache-ssd 0 does without")
    if NETWORK.fullmatch(place.kind):
        return warn("SSD tier", f"{place.text}: a network is slower than a disk", f"{elsewhere}, on a local disk")
    if place.kind in IN_MEMORY:
        text = f"{place.text}: this is memory, and empty after a restart of the machine"
        return warn("SSD tier", text, f"{elsewhere}, on a disk")
    used = _used(config.cache_folder)
    room, wanted = place.free - config.ssd_min_free, max(0, config.cache_ssd - used)
    if room <= 0:
        text = f"{place.text}, and {shown(config.ssd_min_free)} stay free: nothing can be saved"
        return warn("SSD tier", text, f"make room, or a smaller --ssd-min-free; {elsewhere}")
    if room < wanted:
        text = f"{place.text}, {shown(config.ssd_min_free)} of them stay so: not enough for {shown(config.cache_ssd)}"
        return warn("SSD tier", text, f"make room, or --cache-ssd {(used + room) // 10**9}GB; {elsewhere}")
    return ok("SSD tier", f"{place.text}, {shown(used)} of {shown(config.cache_ssd)} used")


def look(folder: Path) -> Place:
    """Try to write to the folder, or to what exists above it."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"kvarn")
            file.flush()
        free = shutil.disk_usage(existing).free
    except OSError as error:
        return Place(folder, 0, "", f"cannot be written to: {error.strerror}")
    return Place(folder, free, file_system(existing.resolve()), "")


def file_system(path: Path) -> str:
    """Type of the file system that a resolved path is on; empty where it cannot be found out."""
    mounts = _mounts_of_mac() if sys.platform == "darwin" else _mounts_of_linux()
    around = [(len(point.parts), kind) for point, kind in mounts if path.is_relative_to(point)]
    # The last of several mounts on one point is the one that is seen.
    return max(reversed(around), key=lambda found: found[0])[1] if around else ""


def _mounts_of_linux() -> list[tuple[Path, str]]:
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), left.split()[4])
        mounts.append((Path(point), right.split()[0]))
    return mounts


def _mounts_of_mac() -> list[tuple[Path, str]]:
    """From lines such as ``/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled)``."""
    try:
        listed = subprocess.run(["/sbin/mount"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return []
    found = re.finditer(r"^.* on (/.*) \(([^,)]+)[^)]*\)$", listed, re.MULTILINE)
    return [(Path(match[1]), match[2]) for match in found]


def _used(folder: Path) -> int:
    try:
        return sum(use.bytes for use in upkeep.usage(folder)) if folder.is_dir() else 0
    except OSError:  # it vanished meanwhile
        return 0
