"""API keys: which are valid, and whose. Keys are kept as hashes and compared in constant time.

A key file has one key per line, with a name before it if its owner is to be told apart in logs and metrics; empty lines
and lines that begin with # are skipped. It is read again on SIGHUP. What looks like a slip is refused: a comment or a
name in the key's place would be a key that everybody may guess.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

LEAST_LENGTH = 8
LONGEST_NAME = 32


class BadKeys(Exception):  # noqa: N818 - it names what is wrong
    """Keys that cannot be used; the message is for the user and never contains a key."""


class Keys:
    """The valid keys; without any, everybody may come in."""

    def __init__(self, given: Iterable[str], file: Path | None) -> None:
        """Raises BadKeys."""
        self._given = tuple(given)
        self._file = file
        self._known: Mapping[bytes, str] = {}
        self._owners = 0
        self.reload()

    def __bool__(self) -> bool:
        return bool(self._known)

    @property
    def several(self) -> bool:
        """Whether they have more than one owner."""
        return self._owners > 1

    def reload(self) -> int:
        """Read the file again; the number of keys. Raises BadKeys, and then the keys stay as they were."""
        known: dict[bytes, str] = {}
        for number, key in enumerate(self._given, 1):
            known |= _entry(key, "", f"api_key: key {number}")
        if self._file is not None:
            known |= _read(self._file)
            if not known:
                raise BadKeys(f"api_key_file: {self._file} has no keys")
        self._known = known
        self._owners = len(set(known.values()))
        return len(known)

    def owner(self, key: bytes) -> str | None:
        """Who shows this key, by name or by the beginning of its hash; None: nobody may."""
        digest = hashlib.sha256(key).digest()
        found = None
        for known, name in self._known.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        return found


def _read(file: Path) -> dict[bytes, str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadKeys(f"api_key_file: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    known: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"api_key_file: {file}, line {number}"
        if len(words) > 2:
            raise BadKeys(f"{where}: must be a key, or a name and a key")
        entry = _entry(words[-1], words[0] if len(words) == 2 else "", where)
        if entry.keys() & known.keys():
            raise BadKeys(f"{where}: this key is there twice")
        known |= entry
    return known


def _entry(key: str, name: str, where: str) -> dict[bytes, str]:
    if len(key) < LEAST_LENGTH or not key.isascii() or not key.isprintable() or " " in key or key.startswith("#"):
        allowed = f"at least {LEAST_LENGTH} printable ASCII characters without spaces, the first of them no #"
        raise BadKeys(f"{where}: a key must be {allowed}")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise BadKeys(f"{where}: a name must be at most {LONGEST_NAME} printable characters, and comes before the key")
    digest = hashlib.sha256(key.encode()).digest()
    return {digest: name or f"key-{digest.hex()[:8]}"}
