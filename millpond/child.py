"""How Millpond starts Python for processes of its own.

The folder that a server happens to be started in is no place to import from: a file named ``numpy.py`` there, or
another checkout of Millpond, would be run instead of what is installed, and nothing would tell. ``python -m`` and
``-c`` put that folder first; ``-P`` keeps it out. PYTHONPATH is the user's own word and stays, but for its empty
entries: they mean that folder again, and come from ``export PYTHONPATH=$PYTHONPATH:…`` rather than from a wish.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

SECRETS = ("MILLPOND_API_KEY", "MILLPOND_TP_SECRET")
"""Engines and ranks have no business with them, and whoever may read their environment neither."""


def python(*arguments: str, program: str = sys.executable) -> tuple[str, ...]:
    """The command that runs Python with ``arguments``. Every child of ours is started with it."""
    return (program, "-P", *arguments)


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Our environment without its secrets, and ``environment`` on top."""
    return {**{name: os.environ[name] for name in os.environ if name not in SECRETS}, **search_path(), **environment}


def search_path() -> dict[str, str]:
    """PYTHONPATH without its empty entries; nothing where it is not set."""
    given = os.environ.get("PYTHONPATH")
    if given is None:
        return {}
    return {"PYTHONPATH": os.pathsep.join(entry for entry in given.split(os.pathsep) if entry)}
