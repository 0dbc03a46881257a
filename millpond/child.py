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

TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
"""glibc reads the first when a process begins; the second, at 1, has it ask the kernel for pages of 2 MiB."""


def python(*arguments: str, program: str = sys.executable) -> tuple[str, ...]:
    """The command that runs Python with ``arguments``. Every child of ours is started with it."""
    return (program, "-P", *arguments)


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """Our environment without its secrets, for a process that computes, and ``environment`` on top."""
    ours = {name: os.environ[name] for name in os.environ if name not in SECRETS}
    return {**ours, **search_path(), **huge_pages(), **environment}


def huge_pages() -> dict[str, str]:
    """What asks glibc for large pages, unless the user has a word on them. Fresh memory comes several times faster in
    those, and a restored prefix is all fresh memory. Elsewhere nobody reads it."""
    given = os.environ.get(TUNABLES, "")
    return {} if HUGE_PAGES in given else {TUNABLES: ":".join(filter(None, (given, f"{HUGE_PAGES}=1")))}


def search_path() -> dict[str, str]:
    """PYTHONPATH without its empty entries; nothing where it is not set."""
    given = os.environ.get("PYTHONPATH")
    if given is None:
        return {}
    return {"PYTHONPATH": os.pathsep.join(entry for entry in given.split(os.pathsep) if entry)}
