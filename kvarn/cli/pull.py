"""``kvarn pull``: have a model on this machine before it is served."""

from __future__ import annotations

import sys

from kvarn.hub.errors import SourceError
from kvarn.hub.progress import TerminalProgress
from kvarn.hub.source import resolve


def pull(model: str) -> int:
    """Fetch or convert ``model`` and print its folder on standard output. Returns the exit status."""
    try:
        resolved = resolve(model, TerminalProgress())
    except SourceError as error:
        print(f"kvarn: {error}", file=sys.stderr)
        return 1
    print(resolved.path)
    return 0
