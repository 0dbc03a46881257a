"""The folders that Millpond writes to: is there room, may it write, and what kind of disk is it?"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from millpond.cli.doctor.finding import Finding, fail, ok, shown, warn
from millpond.config import ServeConfig
from millpond.hub.cache import ELSEWHERE, VARIABLE, NoCache, cache_root, unwritable, writable_by_others
from millpond.prefix.disk import upkeep

LEAST_FREE_BYTES = 2 * 2**30
WITHOUT = "Each start finds everything out anew, and no model can be converted"
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
    """The folder of what Millpond makes, and the one of the models of the hub."""
    try:
        root = cache_root()
    except NoCache as error:
        yield warn("cache", f"{error}. {WITHOUT}", f"give this account a home folder; {ELSEWHERE}")
    else:
        found = _cache("cache", root, VARIABLE, WITHOUT)
        yield found
        if found.state == "ok" and writable_by_others(root):
            yield warn("cache", f"{root}: other accounts can put files into it", f"chmod go-w {root}; {ELSEWHERE}")
    from huggingface_hub.constants import HF_HUB_CACHE  # what it reads from the environment

    yield _cache("hub", Path(HF_HUB_CACHE), "HF_HUB_CACHE", "only what was fetched before can be served")


def _cache(subject: str, folder: Path, variable: str, without: str) -> Finding:
    place = look(folder)
    elsewhere = f"{variable}=FOLDER names another one"
    if place.error:
        return warn(subject, f"{place.text}. {without}", f"let this account write there; {elsewhere}")
    if place.free < LEAST_FREE_BYTES:
        return warn(subject, place.text, f"make room for models; {elsewhere}")
    if NETWORK.fullmatch(place.kind):
        return warn(subject, f"{place.text}: models load slowly over a network", f"{elsewhere}, on a local disk")
    return ok(subject, place.text)


def ssd(config: ServeConfig) -> Finding:
    """The SSD tier of the prefix cache."""
    if config.cache_ram == 0 or config.cache_ssd == 0:
        return ok("SSD tier", f"off: {'cache_ram' if config.cache_ram == 0 else 'cache_ssd'} is 0")
    folder = config.cache_folder
    elsewhere = "--cache-dir FOLDER names another folder"
    if folder is None:
        return warn("SSD tier", "there is no folder for it: prefixes are kept in memory only", elsewhere)
    place = look(folder)
    if place.error:
        asked_for = any(name.startswith(("ssd_", "cache_dir", "cache_ssd")) for name in config.model_fields_set)
        complain = fail if asked_for else warn
        remedy = f"let this account write there; {elsewhere}; --cache-ssd 0 does without"
        return complain("SSD tier", f"{place.text}. Prefixes are kept in memory only", remedy)
    if NETWORK.fullmatch(place.kind):
        return warn("SSD tier", f"{place.text}: a network is slower than a disk", f"{elsewhere}, on a local disk")
    if place.kind in IN_MEMORY:
        text = f"{place.text}: this is memory, and empty after a restart of the machine"
        return warn("SSD tier", text, f"{elsewhere}, on a disk")
    used = _used(folder)
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
    why = unwritable(folder)
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        why, free = why or error.strerror or type(error).__name__, 0
    if why:
        return Place(folder, 0, "", f"cannot be written to: {why}")
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
    except (OSError, sqlite3.Error):  # it vanished meanwhile, or cannot be looked into
        return 0
