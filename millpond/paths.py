"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


def expanded(text: str) -> Path:
    """A path without ``~``. Raises ValueError, in words, where there is no such home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        who = text.partition("/")[0]
        if who == "~":
            raise ValueError("there is no home folder: HOME is not set, and the system knows none") from None
        raise ValueError(f"there is no such user: {who[1:]}") from None
