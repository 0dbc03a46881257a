"""Typed messages between the front end and the engine process: msgpack over a socket, length-prefixed.

A frame is a 4-byte big-endian length followed by that many bytes of msgpack, at most MAX_FRAME. Anything that does
not decode to one of the message types raises WireError: there is no partial understanding.
"""

from __future__ import annotations

import struct

import msgspec

from millpond.settings import PrefixSettings
from millpond.types import (
    UNPACKED,
    Delta,
    EngineCounters,
    ErrorKind,
    GroupSettings,
    KvPacking,
    ModelInfo,
    PrefixLoad,
    PrefixReport,
    Request,
    Salt,
    SpecSettings,
)

VERSION = 13
MAX_FRAME = 64 * 1024 * 1024
HEADER = struct.Struct(">I")


class WireError(Exception):
    """A frame that is too large, of another version, or not a known message."""


# --- front end → engine -----------------------------------------------------------------------------------------


class Start(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """First message: what to load and within which limits."""

    version: int = VERSION
    model_path: str
    context_length: int = 0
    """0: the model's own."""
    max_batch: int
    max_itl_ms: float
    prefill_chunk: int = 0
    """Most prompt tokens in one forward; 0: chosen by device."""
    kv_memory_bytes: int = 0
    """0: chosen from the machine's memory."""
    wired_bytes: int | None = None
    """Kept from being swapped out; None: chosen."""
    packing: KvPacking = UNPACKED
    deterministic: bool = False
    """Answers are to be the same whatever the load."""
    prefix: PrefixSettings = PrefixSettings()
    spec: SpecSettings = SpecSettings()
    group: GroupSettings | None = None
    """Rank 0's place in a group; None: this engine runs the model alone."""


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Cancel(msgspec.Struct, frozen=True, tag=True):
    id: str


class Explain(msgspec.Struct, frozen=True, tag=True):
    """What would the prefix cache do for this prompt? ``id`` comes back with the answer."""

    id: str
    tokens: list[int]
    cache_salt: Salt


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Finish nothing more: cancel what runs and exit with status 0."""


# --- engine → front end -----------------------------------------------------------------------------------------


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of the start, in the words of the log: ``stage`` and how far in [0, 1]."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The warm-up forward has run; requests are welcome."""

    info: ModelInfo


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """What one step produced, for all requests at once."""

    items: list[Delta]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request ended without its answer."""

    id: str
    kind: ErrorKind
    message: str


class Beat(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Twice a second, from the socket thread: ``step`` tells progress, the rest tells load."""

    step: int
    running: int
    waiting: int
    kv_bytes: int
    """Bytes of key and value arrays held, arenas and prefill caches together."""
    wait_seconds: float = 0.0
    """Predicted: how long a request that came now would wait for its prompt to be begun."""
    counters: EngineCounters = EngineCounters()
    prefix: PrefixLoad = PrefixLoad()


class Explained(msgspec.Struct, frozen=True, tag=True):
    """The answer to an Explain."""

    id: str
    report: PrefixReport


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; it exits right after this."""

    message: str


ToEngine = Start | Submit | Cancel | Explain | Stop
FromEngine = Loading | Ready | Deltas | Failed | Explained | Beat | Fatal

UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no message: text that is none, and nesting without end, among them."""

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One whole frame, header included. Raises WireError above MAX_FRAME."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise WireError(f"message of {len(body)} bytes; the largest allowed is {MAX_FRAME}")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """Body length announced by a 4-byte header. Raises WireError above MAX_FRAME."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME:
        raise WireError(f"frame of {length} bytes announced; the largest allowed is {MAX_FRAME}")
    return int(length)


def decode_to_engine(body: bytes) -> ToEngine:
    """Decode a frame's body on the engine's side. Raises WireError."""
    try:
        return _to_engine.decode(body)
    except UNDECODABLE as error:
        raise WireError(f"undecodable message to the engine: {error}") from error


def decode_from_engine(body: bytes) -> FromEngine:
    """Decode a frame's body on the front end's side. Raises WireError."""
    try:
        return _from_engine.decode(body)
    except UNDECODABLE as error:
        raise WireError(f"undecodable message from the engine: {error}") from error
