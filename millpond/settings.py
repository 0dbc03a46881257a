"""Settings of the prefix cache on their way from the command line to their use, each named as its flag.

config.py says what they mean to the user. Plain data.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec


class SavePolicy(StrEnum):
    """A contract with the user's disk; docs/prefix-cache.md says what each survives.

    ``all``: every block as soon as it is full, tails when their request ends.
    ``second-use``: a block once a second request has restored it; at an orderly stop, the newest conversations.
    ``evicted``: a block before it leaves memory; at an orderly stop, everything in memory.
    ``off``: nothing in the folder is changed; what is there is still read.
    """

    ALL = "all"
    SECOND_USE = "second-use"
    EVICTED = "evicted"
    OFF = "off"


class PrefixSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the prefix cache is set up. Sizes are bytes, times are seconds."""

    cache_ram: int | None = None
    """None: chosen from the machine's memory; 0: nothing is cached."""
    cache_selfcheck: int = 0
    cache_dir: str = ""
    """Empty: where models are cached."""
    cache_ssd: int = 0
    """Most for record files in the folder, all models together; neither the index nor the quarantine counts. 0: no SSD
    tier."""
    ssd_policy: SavePolicy = SavePolicy.SECOND_USE
    ssd_durability: Literal["best-effort", "durable"] = "best-effort"
    """durable: what is reported as saved survives a loss of power; else a crash of the process."""
    ssd_ttl: float = 0.0
    """Records unused for longer are removed; 0: none are."""
    ssd_daily_writes: int = 0
    """Most written per UTC day; 0: no limit."""
    ssd_min_free: int = 0
    """Space that stays free on the disk: records are evicted, or not written, to keep it."""
    label: str = ""
    """The model's name, for people who look into the folder."""
