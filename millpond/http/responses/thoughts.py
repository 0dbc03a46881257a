"""Thoughts that a client keeps for us: what it gets as `encrypted_content` it sends back, and it is read again.

Nothing is secret in it; a mark and a checksum tell our own from what another server has written.
"""

from __future__ import annotations

import binascii
import zlib
from base64 import b64decode, b64encode

_MARK = b"millpond thought 1\n"


def sealed(thought: str) -> str:
    """What the client is to keep."""
    text = thought.encode("utf-8", "replace")
    return b64encode(_MARK + zlib.crc32(text).to_bytes(4, "big") + text).decode()


def opened(kept: str) -> str | None:
    """The thought again; None where it is not one of ours, or has been changed."""
    try:
        found = b64decode(kept, validate=True)
    except (binascii.Error, ValueError):
        return None
    head, text = found[: len(_MARK) + 4], found[len(_MARK) + 4 :]
    return text.decode("utf-8", "replace") if head == _MARK + zlib.crc32(text).to_bytes(4, "big") else None
