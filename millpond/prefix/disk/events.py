"""What the SSD tier tells the engine. Plain data."""

from __future__ import annotations

import msgspec

from millpond.prefix.records import Kind, RecordId, Tensor


class DiskEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A record on disk, without its tensors."""

    key: bytes
    kind: Kind
    parent: bytes
    start: int
    tokens: bytes
    nbytes: int
    """Size of its file."""

    @property
    def id(self) -> RecordId:
        return RecordId(self.key, self.kind)


class Opened(msgspec.Struct, frozen=True):
    """The first event: what the folder holds for this namespace."""

    entries: list[DiskEntry]
    problem: str = ""
    """Why the tier cannot be used now, or not in full; empty when it can. It goes on trying."""


class Found(msgspec.Struct, frozen=True):
    """Records that were on disk without being in the index, or came into view later."""

    entries: list[DiskEntry]


class Loaded(msgspec.Struct, frozen=True):
    """The answer to a read."""

    ticket: int
    id: RecordId
    tensors: tuple[Tensor, ...] = ()
    payload: memoryview | None = None
    """In a buffer that is used again: hand it back with ``SsdTier.release``. None when there is a problem."""
    seconds: float = 0.0
    """From the start of the read to the end of its verification; waiting in the queue is not in it."""
    problem: str = ""
    """Why there is no payload: a miss."""


class Saved(msgspec.Struct, frozen=True):
    """The answer to a write."""

    id: RecordId
    nbytes: int
    """Size of the file."""
    problem: str = ""
    """Why it was not saved; empty when it is on disk and in the index."""


class Gone(msgspec.Struct, frozen=True):
    """Records that are not on disk any more: evicted, expired, missing, damaged, discarded. May name some twice."""

    ids: list[RecordId]


SsdEvent = Opened | Found | Loaded | Saved | Gone
