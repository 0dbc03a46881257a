"""Identity of cached blocks: a chain of sha256 over a namespace and the tokens so far. Pure.

Two blocks have the same key only if everything before them, and everything that decides what keys and values look like,
is the same. The namespace says the latter; see ``Namespace``.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from importlib import metadata

import msgspec

from millpond.prefix.records import BLOCK

FORMAT = 1
"""Raise it when the same model would store something else for the same tokens."""
TOKEN_BYTES = 4


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be equal for a block to be valid. Token ids decide the rest, so no tokenizer appears here."""

    weights: str
    """Fingerprint of weights and config, by content: two fine-tunes share names, sizes and headers."""
    adapter: str = ""
    """Fingerprint of an adapter; empty for none."""
    kv_format: str
    """Element type of keys and values."""
    layers: list[str]
    """One line per layer: kind, heads, dimensions, window."""
    rank: int = 0
    world: int = 1
    format: int = FORMAT
    block: int = BLOCK
    code: str = msgspec.field(default_factory=lambda: ".".join(metadata.version("mlx-lm").split(".")[:2]))
    """mlx-lm's major.minor: a fix of its attention or rope changes values."""

    @property
    def digest(self) -> str:
        """sha256 over a canonical form, hex."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def root_key(namespace: str, salt: str = "") -> bytes:
    """Where the chains of one namespace, and of one tenant's ``salt``, begin: 32 bytes."""
    return hashlib.sha256(f"{namespace}\0{salt}".encode()).digest()


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as unsigned 32-bit big-endian: bytes compare like the lists they stand for."""
    packed = array("I", tokens)
    if sys.byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def next_key(parent: bytes, tokens: bytes) -> bytes:
    """Key of the block of packed ``tokens`` that follows the block ``parent``."""
    return hashlib.sha256(parent + tokens).digest()


def common_tokens(left: bytes, right: bytes) -> int:
    """How many tokens two packed lists share from their start."""
    if left == right:
        return len(left) // TOKEN_BYTES
    shorter = min(len(left), len(right))
    low, high = 0, shorter // TOKEN_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        if left[: middle * TOKEN_BYTES] == right[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle - 1
    return low
