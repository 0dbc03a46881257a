"""One authenticated connection between rank 0 (the leader, which accepts) and a follower: frames over blocking TCP.

Greeting, each way, in the clear, the same in every version: magic | 4-byte version | 32-byte nonce. Then the follower
proves that it knows the group's secret, then the leader: HMAC-SHA256 under the secret of both greetings and the role.
Each direction has a key of its own, derived likewise, so nothing said in another session or direction is taken for
this one. A stranger learns the version and a nonce, nothing else.

Frame: 4-byte big-endian length | 16-byte MAC | body. The MAC covers the frame's number and the body, so a frame that
was altered, repeated, dropped or moved is refused, and nothing after it is accepted. The length is judged before
anything is read. Nothing is encrypted: who can listen reads the bodies. Nor is the connection's end authenticated:
whoever needs a farewell says it in a body.

A channel has no thread of its own; any thread may call any method.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from typing import Final, Literal

VERSION = 1
MOST_BYTES = 16 * 1024 * 1024
"""The largest body."""

_MAGIC: Final = b"mpond-tp"
_VERSION: Final = struct.Struct(">I")
_NONCE_BYTES: Final = 32
_PROOF_BYTES: Final = hashlib.sha256().digest_size

_LENGTH: Final = struct.Struct(">I")
_NUMBER: Final = struct.Struct(">Q")
_MAC_BYTES: Final = 16
_HEADER_BYTES: Final = _LENGTH.size + _MAC_BYTES
_PIECE_BYTES: Final = 256 * 1024
"""Read at once at most: memory follows what has arrived, not what a header announces."""

_Role = Literal["leader", "follower"]


class ChannelError(Exception):
    """The peer is not who it should be, or its stream is malformed. The message is for the log and holds no secret."""


class Channel:
    """A connection whose peer has proven that it knows the secret. It owns the socket, from the handshake on."""

    def __init__(self, connection: socket.socket, outgoing: bytes, incoming: bytes) -> None:
        """``accept`` and ``connect`` make channels; the arguments are what their handshake agreed on."""
        self._connection = connection
        self._outgoing = _Seal(outgoing)
        self._incoming = _Seal(incoming)
        # Reentrant, so that a signal handler may close a channel that its own thread is using.
        self._sending = threading.RLock()
        self._receiving = threading.RLock()
        self._closed = threading.Event()
        self._refused: str | None = None

    @classmethod
    def accept(cls, connection: socket.socket, secret: bytes, seconds: float) -> Channel:
        """The leader's side. Raises ChannelError, and closes the connection, unless all is done within ``seconds``."""
        return cls._open(connection, secret, seconds, "leader", "follower")

    @classmethod
    def connect(cls, connection: socket.socket, secret: bytes, seconds: float) -> Channel:
        """The follower's side. Raises ChannelError, and closes the connection, like ``accept``."""
        return cls._open(connection, secret, seconds, "follower", "leader")

    @classmethod
    def _open(cls, connection: socket.socket, secret: bytes, seconds: float, role: _Role, peer: _Role) -> Channel:
        try:
            outgoing, incoming = _Handshake(connection, secret, seconds, role, peer).run()
        except BaseException:
            connection.close()
            raise
        return cls(connection, outgoing, incoming)

    def send(self, body: bytes) -> None:
        """Write one whole frame.

        Raises ChannelError above MOST_BYTES, with nothing written, and OSError when the connection is gone.
        """
        if len(body) > MOST_BYTES:
            raise ChannelError(f"body of {len(body)} bytes; the largest allowed is {MOST_BYTES}")
        with self._sending:
            if self._closed.is_set():
                raise BrokenPipeError("the channel was closed on this side")
            self._connection.sendall(_LENGTH.pack(len(body)) + self._outgoing.next(body) + body)

    def receive(self) -> bytes | None:
        """The next body, or None when the peer ended between two frames or ``close`` was called here.

        Raises ChannelError for anything malformed, then and on every later call, and OSError.
        """
        with self._receiving:
            if self._closed.is_set():
                return None
            if self._refused is not None:
                raise ChannelError(self._refused)
            try:
                return self._frame()
            except (ChannelError, OSError) as error:
                if self._closed.is_set():
                    return None
                if isinstance(error, ChannelError):
                    self._refused = str(error)
                raise

    def close(self) -> None:
        """End the connection, both ways, and wake whoever is blocked in ``send`` (OSError) or ``receive`` (None)."""
        self._closed.set()
        with contextlib.suppress(OSError):  # gone already: then nobody is blocked
            self._connection.shutdown(socket.SHUT_RDWR)
        # Closed only when nobody uses the socket: its number may be another file's a moment later. One lock after the
        # other, as two threads that close could wait for each other's; whoever sends from now on sees ``_closed``.
        with self._sending:
            pass
        with self._receiving:
            self._connection.close()

    def _frame(self) -> bytes | None:
        header = self._read(_HEADER_BYTES)
        if not header:
            return None
        if len(header) < _HEADER_BYTES:
            raise self._cut_off(f"{len(header)} of {_HEADER_BYTES} bytes of a header")
        (length,) = _LENGTH.unpack_from(header)
        if length > MOST_BYTES:
            raise ChannelError(f"frame of {length} bytes announced; the largest allowed is {MOST_BYTES}")
        body = self._read(length)
        if len(body) < length:
            raise self._cut_off(f"{len(body)} of {length} bytes of a body")
        number = self._incoming.number
        if not hmac.compare_digest(header[_LENGTH.size :], self._incoming.next(body)):
            raise ChannelError(f"frame {number} of {length} bytes is not what the peer sent here: its MAC is wrong")
        return body

    def _cut_off(self, had: str) -> ChannelError:
        return ChannelError(f"the stream ended inside frame {self._incoming.number}, after {had}")

    def _read(self, count: int) -> bytes:
        """``count`` bytes, or fewer when the stream ends before."""
        piece = self._connection.recv(min(count, _PIECE_BYTES)) if count else b""
        if len(piece) == count or not piece:
            return piece
        pieces = [piece]
        left = count - len(piece)
        while left and (piece := self._connection.recv(min(left, _PIECE_BYTES))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


class _Seal:
    """The MACs of one direction's frames, in their order."""

    def __init__(self, key: bytes) -> None:
        self._keyed = hmac.new(key, digestmod=hashlib.sha256)
        self.number = 0

    def next(self, body: bytes) -> bytes:
        mac = self._keyed.copy()
        mac.update(_NUMBER.pack(self.number))
        mac.update(body)
        self.number += 1
        return mac.digest()[:_MAC_BYTES]


class _Handshake:
    """Run once on a fresh connection: afterwards both sides know each other and the keys of the two directions."""

    def __init__(self, connection: socket.socket, secret: bytes, seconds: float, role: _Role, peer: _Role) -> None:
        if not secret:
            raise ChannelError("the group's secret is empty; at least one byte is needed")
        self._connection = connection
        self._secret = secret
        self._seconds = seconds
        self._end = time.monotonic() + seconds
        self._role: _Role = role
        self._peer: _Role = peer

    def run(self) -> tuple[bytes, bytes]:
        """The keys of the outgoing and the incoming direction; the socket then blocks without a time limit."""
        try:
            keys = self._run()
            self._connection.settimeout(None)
        except TimeoutError as error:
            raise ChannelError(f"no handshake with the {self._peer} within {self._seconds:g} s") from error
        except OSError as error:
            raise ChannelError(f"the connection broke in the handshake with the {self._peer}: {error}") from error
        return keys

    def _run(self) -> tuple[bytes, bytes]:
        if self._connection.family != socket.AF_UNIX:
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        ours = secrets.token_bytes(_NONCE_BYTES)
        # Both greet at once, unasked: of two versions, each side can then say which the other has.
        self._write(_MAGIC + _VERSION.pack(VERSION) + ours)
        theirs = self._greeting()
        nonces = ours + theirs if self._role == "leader" else theirs + ours
        transcript = _MAGIC + _VERSION.pack(VERSION) + nonces
        proof, expected = self._derive(transcript, "proof", self._role), self._derive(transcript, "proof", self._peer)
        # The follower first: strangers come to the leader's port, and it proves nothing to them.
        if self._role == "follower":
            self._write(proof)
            self._verify(expected)
        else:
            self._verify(expected)
            self._write(proof)
        return self._derive(transcript, "frames", self._role), self._derive(transcript, "frames", self._peer)

    def _greeting(self) -> bytes:
        """The peer's nonce. The magic is judged by itself: what is no rank may say less than a greeting, then wait."""
        if self._read(len(_MAGIC), "greeting") != _MAGIC:
            raise ChannelError(
                f"the peer is not a {self._peer} of a Millpond group: its greeting does not begin as ours"
            )
        rest = self._read(_VERSION.size + _NONCE_BYTES, "greeting")
        (version,) = _VERSION.unpack_from(rest)
        if version != VERSION:
            raise ChannelError(
                f"the {self._peer} speaks version {version} of the group's protocol, this {self._role} version "
                f"{VERSION}; all ranks need the same Millpond"
            )
        return rest[_VERSION.size :]

    def _derive(self, transcript: bytes, purpose: Literal["proof", "frames"], role: _Role) -> bytes:
        return hmac.digest(self._secret, transcript + f"{purpose} of the {role}".encode(), "sha256")

    def _verify(self, expected: bytes) -> None:
        if not hmac.compare_digest(self._read(_PROOF_BYTES, "proof; its secret may be another"), expected):
            raise ChannelError(f"the {self._peer}'s proof is wrong: its secret is another, or its bytes were altered")

    def _write(self, message: bytes) -> None:
        self._connection.settimeout(self._left())
        self._connection.sendall(message)

    def _read(self, count: int, what: str) -> bytes:
        data = b""
        while len(data) < count:
            self._connection.settimeout(self._left())
            piece = self._connection.recv(count - len(data))
            if not piece:
                raise ChannelError(f"the {self._peer} closed the connection before the end of its {what}")
            data += piece
        return data

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left
