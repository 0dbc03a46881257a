"""Which detokenizer fits a tokenizer, found by reading the description of the tokenizer's own decoder.

`tokenizers` decodes by looking up each id's piece, leaving out unknown ids and special tokens, and handing the pieces
to a chain of decoders; added tokens that are not special go through the chain like any other. The common chains are
recognised here and run token by token; any other is left to `tokenizers`, on the whole answer at once.

The per-token tables are filled on first use and shared by all requests; every entry is a pure function of its key, so
two threads that fill the same one do no harm.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Protocol

import tokenizers
from tokenizers.decoders import Decoder

from millpond.text.detokenize import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    Detokenizer,
    PieceDetokenizer,
    WholeDetokenizer,
)
from millpond.text.errors import reading

log = logging.getLogger(__name__)

# What ByteFallback takes for a byte token. The optional plus sign is an accident of its number parser, kept for parity.
_BYTE_TOKEN = re.compile(r"<0x(\+?[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")
_BYTE_TOKEN_LENGTH = 6


class Decoding(Protocol):
    """How one tokenizer turns ids into text."""

    def detokenizer(self) -> Detokenizer:
        """A fresh one, for one answer."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for by itself, special tokens included; none for an unknown id."""


class Pieces:
    """The vocabulary as the decoder sees it: id to piece."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        # By content, as `tokenizers` does it: a vocabulary entry that reads like a special token is hidden too.
        self._special = frozenset(token.content for token in added if token.special)

    def any(self, token: int) -> str | None:
        """The piece of any token; None for an unknown id."""
        return self._backend.id_to_token(token)

    def shown(self, token: int) -> str | None:
        """The piece of a token that decoding shows; None for unknown ids and special tokens."""
        piece = self._backend.id_to_token(token)
        return None if piece is None or piece in self._special else piece

    def hidden(self, token: int) -> bool:
        return self.shown(token) is None

    def decode(self, ids: Sequence[int]) -> str:
        """All ids at once, special tokens left out, by `tokenizers` itself. Raises TextError."""
        return decoded(self._backend, ids)


class ByteLevelDecoding:
    """Pieces spell bytes in the GPT-2 alphabet of 256 printable characters."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._shown: dict[int, bytes] = {}

    def detokenizer(self) -> Detokenizer:
        return ByteLevelDetokenizer(self._shown_bytes)

    def token_bytes(self, token: int) -> bytes:
        return self._to_bytes(self._pieces.any(token))

    def _shown_bytes(self, token: int) -> bytes:
        data = self._shown.get(token)
        if data is None:
            data = self._shown[token] = self._to_bytes(self._pieces.shown(token))
        return data

    @staticmethod
    def _to_bytes(piece: str | None) -> bytes:
        if piece is None:
            return b""
        try:
            return bytes([_BYTE_OF[char] for char in piece])
        except KeyError:
            # A piece with any character outside the alphabet (an added token, mostly) stands for itself.
            return piece.encode()


class ByteFallbackDecoding:
    """Pieces are text after some replacements, and <0xNN> pieces are bytes."""

    def __init__(self, pieces: Pieces, replaces: Sequence[tuple[str, str]], strip: tuple[str, int]) -> None:
        self._pieces = pieces
        self._replaces = replaces
        self._strip = strip
        self._shown: dict[int, str | int | None] = {}

    def detokenizer(self) -> Detokenizer:
        return ByteFallbackDetokenizer(self._shown_piece, self._strip)

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces.any(token)
        if piece is None:
            return b""
        text = piece if self._pieces.hidden(token) else self._read(piece)
        return bytes([text]) if isinstance(text, int) else text.encode()

    def _shown_piece(self, token: int) -> str | int | None:
        try:
            return self._shown[token]
        except KeyError:
            piece = self._pieces.shown(token)
            text = self._shown[token] = None if piece is None else self._read(piece)
            return text

    def _read(self, piece: str) -> str | int:
        for old, new in self._replaces:
            piece = piece.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(piece) if len(piece) == _BYTE_TOKEN_LENGTH else None
        return int(match[1], 16) if match else piece


class PieceDecoding:
    """Each piece is decoded alone; only whether it comes first matters. ``decoder`` None: pieces joined by spaces."""

    def __init__(self, pieces: Pieces, decoder: Decoder | None) -> None:
        self._pieces = pieces
        self._decoder = decoder
        self._shown: dict[tuple[int, bool], str | None] = {}

    def detokenizer(self) -> Detokenizer:
        return PieceDetokenizer(self._shown_piece)

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces.any(token)
        if piece is None:
            return b""
        return (piece if self._pieces.hidden(token) else self._read(piece, first=False)).encode()

    def _shown_piece(self, token: int, first: bool) -> str | None:
        try:
            return self._shown[token, first]
        except KeyError:
            piece = self._pieces.shown(token)
            text = self._shown[token, first] = None if piece is None else self._read(piece, first)
            return text

    def _read(self, piece: str, first: bool) -> str:
        if self._decoder is None:
            return piece if first else " " + piece
        with reading("decode these tokens"):
            # An empty piece in front makes this one a later one, and reads as nothing itself.
            return self._decoder.decode([piece] if first else ["", piece])


class WholeDecoding:
    """Nothing is known about the decoder."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces

    def detokenizer(self) -> Detokenizer:
        return WholeDetokenizer(self._pieces.decode)

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces.any(token)
        if piece is None:
            return b""
        return (piece if self._pieces.hidden(token) else self._pieces.decode([token])).encode()


def decoded(backend: tokenizers.Tokenizer, ids: Sequence[int]) -> str:
    """Text of token ids, special tokens and unknown ids left out. Raises TextError."""
    with reading("decode these tokens"):
        # The batch call lets other threads run meanwhile.
        return backend.decode_batch([list(ids)], skip_special_tokens=True)[0]


def decoding_of(backend: tokenizers.Tokenizer) -> Decoding:
    """Choose how to run this tokenizer's decoder token by token."""
    pieces = Pieces(backend)
    decoder = backend.decoder
    if decoder is None:
        return PieceDecoding(pieces, None)
    stages = _stages(json.loads(decoder.__getstate__()))
    kinds = [str(stage["type"]) for stage in stages]
    if kinds == ["ByteLevel"] or kinds == ["ByteLevel", "Fuse"]:
        return ByteLevelDecoding(pieces)
    if kinds == ["Metaspace"] or kinds == ["WordPiece"]:
        return PieceDecoding(pieces, decoder)
    fallback = _byte_fallback(pieces, stages, kinds)
    if fallback is not None:
        return fallback
    log.warning("unfamiliar token decoder (%s): answers of this model arrive all at once", ", ".join(kinds))
    return WholeDecoding(pieces)


def _stages(description: dict[str, object]) -> list[dict[str, object]]:
    """A decoder's description as a flat list of stages."""
    if description["type"] != "Sequence":
        return [description]
    parts = description["decoders"]
    assert isinstance(parts, list)
    return [stage for part in parts for stage in _stages(part)]


def _byte_fallback(
    pieces: Pieces, stages: Sequence[dict[str, object]], kinds: Sequence[str]
) -> ByteFallbackDecoding | None:
    """Recognise Replace*, ByteFallback, then nothing, or Fuse, or Fuse and a Strip of the beginning."""
    if "ByteFallback" not in kinds:
        return None
    at = kinds.index("ByteFallback")
    replaces: list[tuple[str, str]] = []
    for stage in stages[:at]:
        pattern, content = stage.get("pattern"), stage.get("content")
        if stage["type"] != "Replace" or not isinstance(pattern, dict) or not isinstance(content, str):
            return None
        old = pattern.get("String")
        if not old:
            return None
        replaces.append((old, content))
    tail = list(kinds[at + 1 :])
    if tail in ([], ["Fuse"]):
        return ByteFallbackDecoding(pieces, replaces, ("", 0))
    strip = stages[-1]
    content, start = strip.get("content"), strip.get("start")
    if tail == ["Fuse", "Strip"] and strip.get("stop") == 0 and isinstance(content, str) and isinstance(start, int):
        return ByteFallbackDecoding(pieces, replaces, (content, start))
    return None


def _byte_alphabet() -> dict[str, int]:
    """The byte each character of the byte-level alphabet stands for: printable ones themselves, the rest from 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
