"""The content fingerprint of a model folder: which weights and config exactly.

Two fine-tunes share names, sizes and headers, so only the content tells them apart. Digests of big files are kept in
the cache by (path, size, modification time, inode): a start does not read gigabytes again.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import msgspec

from millpond.hub.cache import keep, recalled
from millpond.hub.progress import Progress
from millpond.hub.weights import weight_files

CHUNK = 1 << 22
MEMO = "digests.json"
"""Name of the digests in the cache."""
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")

Identity = tuple[str, int, int, int]
"""Path, size in bytes, modification time in ns, inode."""


class DigestMemo(msgspec.Struct):
    """What the cache remembers: digest by identity, as JSON."""

    digests: list[tuple[Identity, str]] = []


_memo_decoder = msgspec.json.Decoder(DigestMemo)


def folder_fingerprint(folder: Path, progress: Progress) -> str:
    """sha256, hex, over config.json and the weight files that count, names included. Raises SourceError."""
    files = [folder / "config.json", *weight_files(folder).used]
    if (quantization := folder / "hf_quant_config.json").is_file():  # says what the weights mean where config does not
        files.append(quantization)
    total = hashlib.sha256()
    digests = _digest_all(files, progress)
    for file in files:
        total.update(f"{file.name}\0{digests[file]}\0".encode())
    return total.hexdigest()


def file_digest(file: Path, progress: Progress) -> str:
    """sha256 of a file, hex, remembered between starts."""
    return _digest_all([file], progress)[file]


def _digest_all(files: list[Path], progress: Progress) -> dict[Path, str]:
    memo = _read_memo()
    found: dict[Path, str] = {}
    unread: dict[Path, Identity] = {}
    for file in files:
        identity = _identity(file)
        known = _blob_digest(file) or memo.get(identity)
        if known is None:
            unread[file] = identity
        else:
            found[file] = known
    if unread:
        with progress.bar("Reading weights for their fingerprint", sum(i[1] for i in unread.values()), "B") as advance:
            for file, identity in unread.items():
                digest = hashlib.sha256()
                with file.open("rb") as content:
                    while chunk := content.read(CHUNK):
                        digest.update(chunk)
                        advance(len(chunk))
                found[file] = memo[identity] = digest.hexdigest()
        _write_memo(memo)
    return found


def _identity(file: Path) -> Identity:
    stat = file.stat()
    return str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino


def _blob_digest(file: Path) -> str | None:
    """The hub's cache links to blobs named by their sha256 (large files only; small ones by a shorter git id)."""
    if not file.is_symlink():
        return None
    target = file.readlink()
    return target.name if target.parent.name == "blobs" and _BLOB_NAME.fullmatch(target.name) else None


def _read_memo() -> dict[Identity, str]:
    try:
        return dict(_memo_decoder.decode(recalled(MEMO) or b"{}").digests)
    except msgspec.MsgspecError:
        # Damaged: it only saves time, and is written anew.
        return {}


def _write_memo(memo: dict[Identity, str]) -> None:
    """Keep what still exists. Two processes at once: the last one wins, which costs a later start some reading."""
    keep(MEMO, msgspec.json.encode(DigestMemo([(i, d) for i, d in memo.items() if _exists(i[0])])))


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # behind a folder that this account may not look into
        return False
