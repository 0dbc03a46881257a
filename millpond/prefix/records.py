"""What the prefix cache stores: records, each the part of one block that one kind of layer needs.

A block is BLOCK tokens of one prompt or answer, or fewer at its end (a tail). Its ``kv`` record holds the keys and
values of the layers that see everything, its ``window`` record those of sliding-window layers, its ``state`` record a
snapshot of the recurrent layers after the block's last token.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

from millpond.types import GRID

BLOCK = GRID
"""Tokens of a full block. Chunks of a prompt end on the same grid, so whatever has been read is whole blocks."""


class Kind(StrEnum):
    """Which layers a record belongs to."""

    KV = "kv"
    WINDOW = "window"
    STATE = "state"


class RecordId(NamedTuple):
    """One record: its block's chain key (32 bytes, see keys.py) and its kind."""

    key: bytes
    kind: Kind


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """One array of a record as it lies in the payload: row-major, the next one right behind it."""

    dtype: str
    """mlx's name: float32, float16, bfloat16, uint32, ..."""
    shape: tuple[int, ...]
    nbytes: int


class RecordHead(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a record but its payload: enough to find it again from its file alone."""

    key: bytes
    kind: Kind
    parent: bytes
    """Key of the block before; the root's key for the first."""
    start: int
    """Position of the block's first token."""
    tokens: bytes
    """The block's token ids, unsigned 32-bit big-endian: comparing bytes compares token by token."""
    tensors: tuple[Tensor, ...]

    @property
    def id(self) -> RecordId:
        return RecordId(self.key, self.kind)

    @property
    def payload_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class Payload(Protocol):
    """A record's data in memory; what it is made of is the engine's business."""

    @property
    def nbytes(self) -> int:
        """Bytes really held."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """How ``dump`` lays it out."""

    def dump(self) -> bytes:
        """Its bytes, in the order of ``tensors``. Engine thread only."""


class Expected(Protocol):
    """What a reader knows about the record it asks for. A RecordHead and a DiskEntry both do."""

    @property
    def id(self) -> RecordId: ...
    @property
    def key(self) -> bytes: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def parent(self) -> bytes: ...
    @property
    def start(self) -> int: ...
    @property
    def tokens(self) -> bytes: ...
