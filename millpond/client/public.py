"""What clients may be told of something that went wrong inside: one line, without paths of files."""

from __future__ import annotations

import re

LONGEST = 300
_QUOTED = re.compile(r"""(?<!\w)(?P<quote>['"`])(?:(?!(?P=quote)).)*[/\\](?:(?!(?P=quote)).)*(?P=quote)""")
"""As Python shows names of files: blanks and all."""
_BARE = re.compile(r"[^\s'\"`(),;:=<>\[\]]*[/\\](?:[^\s'\"`(),;:<>\[\]]|:(?=\S))*")
_FRACTION = re.compile(r"\d+(\.\d+)?/\d+(\.\d+)?")


def public(message: str) -> str:
    """The first line, whatever may be a path left out. Doing it twice changes nothing."""
    lines = message.strip().splitlines()
    first = _QUOTED.sub("…", lines[0]) if lines else "unknown error"
    return _BARE.sub(lambda found: found[0] if _FRACTION.fullmatch(found[0]) else "…", first)[:LONGEST]
