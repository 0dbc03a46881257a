"""When a block is written to the SSD. Pure."""

from __future__ import annotations

from enum import StrEnum


class SavePolicy(StrEnum):
    """A contract with the user's disk; docs/prefix-cache.md says what each survives.

    ``all``: every block as soon as it is full, tails when their request ends.
    ``second-use``: a block once a second request has restored it; at an orderly stop, the newest conversations.
    ``evicted``: a block before it leaves memory; at an orderly stop, everything in memory.
    ``off``: nothing is written; what is there is still read.
    """

    ALL = "all"
    SECOND_USE = "second-use"
    EVICTED = "evicted"
    OFF = "off"
