"""The format of one record's file, and every check that its content is what was written. Pure: bytes in, bytes out.

A file describes itself, so that the index can be made anew from the files alone::

    magic, version, header bytes, payload bytes, header checksum     32 bytes, little-endian
    header                                                           msgpack: namespace digest and RecordHead
    zeros                                                            up to a multiple of 4 KiB
    payload                                                          the tensors, one behind the other
    checksum                                                         xxh3-128 of everything before it

The checksums find accidents (torn writes, bad sectors, mixed-up files); they do not defend against an attacker who can
write to the folder.
"""

from __future__ import annotations

import struct
from enum import StrEnum
from typing import NamedTuple

import msgspec
import xxhash

from millpond.prefix.keys import next_key
from millpond.prefix.records import Expected, RecordHead

VERSION = 1
"""Raise it when the layout of the file changes."""
ALIGNMENT = 4096
"""The payload begins at a multiple of this many bytes, so that it can be read straight into pages."""
TRAILER_BYTES = 16
_MAGIC = b"MPONDREC"
_PREFIX = struct.Struct("<8sIIQ8s")
PREFIX_BYTES = _PREFIX.size
"""What ``layout`` needs to see of a file."""


class Damage(StrEnum):
    """What is wrong with a record's file."""

    LENGTH = "length"
    MAGIC = "magic"
    VERSION = "version"
    HEADER = "header"
    CHECKSUM = "checksum"
    NAMESPACE = "namespace"
    KEY = "key"
    BLOCK = "block"
    """Parent, position or tokens are not those asked for."""
    CHAIN = "chain"
    """The key does not follow from parent and tokens."""


class DamagedRecord(Exception):  # noqa: N818 - names what was found, not a fault of ours
    """A file that must not be used; the message says why, in words."""

    def __init__(self, damage: Damage, message: str) -> None:
        super().__init__(message)
        self.damage = damage


class Offsets(NamedTuple):
    """Where things lie in a file, in bytes from its beginning."""

    header_end: int
    payload_start: int
    payload_end: int

    @property
    def file_bytes(self) -> int:
        return self.payload_end + TRAILER_BYTES


class _Header(msgspec.Struct, frozen=True, array_like=True):
    namespace: str
    head: RecordHead


_header_decoder = msgspec.msgpack.Decoder(_Header)
"""Made once, at import: see docs/decisions/0033-decoders-are-made-at-import.md."""


def file_bytes(head: RecordHead, namespace: str) -> int:
    """Size of a record's file, known before it is encoded."""
    header = msgspec.msgpack.encode(_Header(namespace, head))
    return _aligned(PREFIX_BYTES + len(header)) + head.payload_bytes + TRAILER_BYTES


def encode(head: RecordHead, namespace: str, payload: bytes) -> list[bytes]:
    """The file of a record as pieces to write one after the other; the payload is passed through, not copied.

    Raises ValueError when the payload is not as long as the head says.
    """
    if len(payload) != head.payload_bytes:
        raise ValueError(f"payload of {len(payload)} bytes where the head says {head.payload_bytes}")
    header = msgspec.msgpack.encode(_Header(namespace, head))
    prefix = _PREFIX.pack(_MAGIC, VERSION, len(header), len(payload), xxhash.xxh3_64_digest(header))
    beginning = (prefix + header).ljust(_aligned(PREFIX_BYTES + len(header)), b"\0")
    checksum = xxhash.xxh3_128(beginning)
    checksum.update(payload)
    return [beginning, payload, checksum.digest()]


def layout(beginning: bytes | bytearray | memoryview) -> Offsets:
    """Where the parts of a file lie, from its first PREFIX_BYTES bytes or more. Raises DamagedRecord."""
    return _prefix(beginning)[0]


def decode_head(beginning: bytes | memoryview, file_bytes: int) -> tuple[str, RecordHead]:
    """Namespace digest and head from the part of a file up to its header's end.

    For making the index anew: the file's length is checked, its payload is not. Raises DamagedRecord.
    """
    parts, header_checksum = _prefix(beginning)
    if file_bytes != parts.file_bytes:
        raise DamagedRecord(Damage.LENGTH, f"{file_bytes} bytes where the file says {parts.file_bytes}")
    header = beginning[PREFIX_BYTES : parts.header_end]
    if len(header) != parts.header_end - PREFIX_BYTES or xxhash.xxh3_64_digest(header) != header_checksum:
        raise DamagedRecord(Damage.HEADER, "the header does not match its checksum")
    try:
        known = _header_decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedRecord(Damage.HEADER, f"the header cannot be read: {error}") from error
    head = known.head
    if head.payload_bytes != parts.payload_end - parts.payload_start or any(t.nbytes < 0 for t in head.tensors):
        raise DamagedRecord(Damage.HEADER, f"tensors of {head.payload_bytes} bytes do not fill the payload")
    if next_key(head.parent, head.tokens) != head.key:
        raise DamagedRecord(Damage.CHAIN, "the key does not follow from parent and tokens")
    return known.namespace, head


def decode(file: memoryview, namespace: str, expected: Expected | None = None) -> tuple[RecordHead, memoryview]:
    """Head and payload (a view, not a copy) of a whole file, verified in full against what is expected of it.

    Raises DamagedRecord for anything that is not exactly what was written for this record in this namespace.
    """
    parts = layout(file)
    if len(file) != parts.file_bytes:
        raise DamagedRecord(Damage.LENGTH, f"{len(file)} bytes where the file says {parts.file_bytes}")
    if xxhash.xxh3_128_digest(file[: parts.payload_end]) != bytes(file[parts.payload_end :]):
        raise DamagedRecord(Damage.CHECKSUM, "the content does not match its checksum")
    found_namespace, head = decode_head(file, len(file))
    if found_namespace != namespace:
        raise DamagedRecord(Damage.NAMESPACE, f"of namespace {found_namespace[:16]}, not {namespace[:16]}")
    if expected is not None:
        _compare(head, expected)
    return head, file[parts.payload_start : parts.payload_end]


def _compare(head: RecordHead, expected: Expected) -> None:
    if (head.key, head.kind) != (expected.key, expected.kind):
        raise DamagedRecord(Damage.KEY, f"record {head.key.hex()[:16]} {head.kind}, not the one asked for")
    if (head.parent, head.start) != (expected.parent, expected.start):
        raise DamagedRecord(Damage.BLOCK, "another parent or position than asked for")
    if head.tokens != expected.tokens:
        raise DamagedRecord(Damage.BLOCK, "other tokens than asked for")


def _prefix(beginning: bytes | bytearray | memoryview) -> tuple[Offsets, bytes]:
    if len(beginning) < PREFIX_BYTES:
        raise DamagedRecord(Damage.LENGTH, f"only {len(beginning)} bytes")
    magic, version, header_bytes, payload_bytes, checksum = _PREFIX.unpack_from(beginning)
    if magic != _MAGIC:
        raise DamagedRecord(Damage.MAGIC, "not a record file")
    if version != VERSION:
        raise DamagedRecord(Damage.VERSION, f"version {version}, not {VERSION}")
    header_end = PREFIX_BYTES + header_bytes
    start = _aligned(header_end)
    return Offsets(header_end, start, start + payload_bytes), checksum


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
