"""Who starts up together: one engine alone, or the ranks of a group. They meet before the first request."""

from __future__ import annotations

from typing import Protocol

import msgspec

from millpond.model.probe import Capabilities
from millpond.model.shard import Group


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank has found out about its share of the model, and what it can hold."""

    capabilities: Capabilities
    limit_bytes: int
    """Of keys and values."""
    layers: tuple[str, ...]
    """How it keeps them: must be the same everywhere."""


class Party(Protocol):
    """The ranks that start up together, as one of them sees them. The methods raise ModelError when they cannot."""

    @property
    def rank(self) -> int:
        """Ours."""

    @property
    def world(self) -> int:
        """How many there are."""

    @property
    def neighbours(self) -> int:
        """How many of them share this machine, this one included; known after ``join``."""

    def join(self, content: str) -> Group | None:
        """Meet the others, who must have the same model (``content`` is its digest); None: there are none."""

    def unanimous(self, vote: bool) -> bool:
        """Whether all of them say yes."""

    def settle(self, found: Found) -> Found:
        """What all of them can do."""


class Lone:
    """No others."""

    rank = 0
    world = 1
    neighbours = 1

    def join(self, content: str) -> Group | None:  # noqa: ARG002 - whatever it is
        return None

    def unanimous(self, vote: bool) -> bool:
        return vote

    def settle(self, found: Found) -> Found:
        return found
