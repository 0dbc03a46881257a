"""From token ids back to text, one token at a time.

What all detokenizers here promise: the deltas joined together equal the decoding of all the ids at once, for any ids;
text is held back only while a later token could still change it, so no delta ends inside a character; and the work per
token does not grow with the answer. ``ends`` says which token brought which part of the text.

They differ by how the tokenizer's own decoder works; decoding.py chooses. One object belongs to one answer and one
thread.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text."""

    @property
    def ends(self) -> Sequence[int]:
        """For each token from the first on, how many characters of the text it and the ones before it make up.

        Never decreases. Tokens at the end whose text is not settled yet have no entry.
        """

    def add(self, token: int) -> str:
        """Take one token id; return the text that has become certain, often none."""

    def finish(self) -> str:
        """No more tokens: return the rest of the text. To be called once."""


def _decoded(data: bytes) -> tuple[str, int]:
    """The text of ``data`` as far as it is certain, and how many bytes that is.

    Python's decoder waits behind half a surrogate, which no third byte can make valid.
    """
    text, used = utf_8_decode(data, "replace", False)
    rest = data[used:]
    if len(rest) == 2 and rest[0] == 0xED and rest[1] >= 0xA0:
        return text + REPLACEMENT * 2, len(data)
    return text, used


class ByteLevelDetokenizer:
    """For byte-level BPE: every token is some bytes, and the bytes together are UTF-8, more or less.

    Invalid sequences become U+FFFD by the Unicode rule (one per maximal subpart), which the decoder in `tokenizers`
    and Python's follow alike.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        """``bytes_of`` gives a token's bytes, none for a token that is not shown."""
        self.ends: list[int] = []
        self._bytes_of = bytes_of
        self._end = 0
        self._open = b""
        """The beginning of a character that is not complete."""
        self._waiting = 0
        """Tokens since the one in which the open character began, that one included."""
        self._owner = 0
        """How many of these there were when the last byte of ``_open`` arrived."""

    def add(self, token: int) -> str:
        data = self._bytes_of(token)
        if not self._open:
            return self._add_clean(data)
        self._waiting += 1
        if not data:
            return ""
        broken = self._breaks(data)
        text, used = _decoded(self._open + data)
        self._open = (self._open + data)[used:]
        if not text:
            self._owner = self._waiting
            return ""
        self._settle(self._waiting - 1, broken)
        self._end += len(text) - broken
        self._close_token()
        return text

    def finish(self) -> str:
        if not self._open:
            return ""
        self._open = b""
        self._settle(self._waiting, True)
        return REPLACEMENT

    def _add_clean(self, data: bytes) -> str:
        text, used = _decoded(data)
        self._open = data[used:]
        self._end += len(text)
        self._close_token()
        return text

    def _close_token(self) -> None:
        """The current token has brought its text; it is settled unless it also opened a character."""
        if self._open:
            self._waiting = self._owner = 1
        else:
            self._waiting = self._owner = 0
            self.ends.append(self._end)

    def _breaks(self, data: bytes) -> bool:
        """True when these bytes do not continue the open character, which therefore becomes U+FFFD."""
        text, used = _decoded(self._open + data[:1])
        return used > 0 and len(text) > used - len(self._open)

    def _settle(self, tokens: int, broken: bool) -> None:
        """Record the ends of that many waiting tokens; a broken character belongs to the one with its last byte."""
        before = self._owner - 1 if broken else tokens
        self.ends.extend([self._end] * before)
        self._end += broken
        self.ends.extend([self._end] * (tokens - before))


class ByteFallbackDetokenizer:
    """For vocabularies of text pieces where rare characters are spelled in byte tokens (Llama 2, Gemma).

    A run of byte tokens is judged as a whole: valid UTF-8 becomes its characters, anything else one U+FFFD per byte.
    So a run is held until a token of another kind ends it.
    """

    def __init__(self, piece_of: Callable[[int], str | int | None], strip: tuple[str, int] = ("", 0)) -> None:
        """``piece_of`` gives a token's text, its byte, or None for a token that is not shown.

        ``strip`` is a character and how many of it at most are taken off the beginning of the text.
        """
        self.ends: list[int] = []
        self._piece_of = piece_of
        self._strip_char, self._strip_left = strip
        self._end = 0
        self._run: list[int | None] = []
        """The byte tokens held, with None for hidden tokens between them."""

    def add(self, token: int) -> str:
        piece = self._piece_of(token)
        if isinstance(piece, int) or (piece is None and self._run):
            self._run.append(piece)
            return ""
        before = self._end_run() if self._run else ""
        return before + self._settle(piece or "")

    def finish(self) -> str:
        return self._end_run()

    def _end_run(self) -> str:
        shares = iter(_byte_shares(bytes(byte for byte in self._run if byte is not None)))
        text = "".join([self._settle("" if byte is None else next(shares)) for byte in self._run])
        self._run = []
        return text

    def _settle(self, share: str) -> str:
        if self._strip_left and share:
            kept = share.lstrip(self._strip_char)
            dropped = min(len(share) - len(kept), self._strip_left)
            self._strip_left = 0 if dropped < len(share) else self._strip_left - dropped
            share = share[dropped:]
        self._end += len(share)
        self.ends.append(self._end)
        return share


def _byte_shares(run: bytes) -> list[str]:
    """The text each byte of a run completes."""
    try:
        text = run.decode()
    except UnicodeDecodeError:
        return [REPLACEMENT] * len(run)
    shares: list[str] = []
    for char in text:
        shares.extend([""] * (len(char.encode()) - 1))
        shares.append(char)
    return shares


class PieceDetokenizer:
    """For decoders that read every token alone, though the very first one differently (WordPiece, Metaspace)."""

    def __init__(self, piece_of: Callable[[int, bool], str | None]) -> None:
        """``piece_of`` gives a token's text, told whether it is the first shown one; None: it is not shown."""
        self.ends: list[int] = []
        self._piece_of = piece_of
        self._first = True
        self._end = 0

    def add(self, token: int) -> str:
        piece = self._piece_of(token, self._first)
        if piece is not None:
            self._first = False
        self._end += len(piece or "")
        self.ends.append(self._end)
        return piece or ""

    def finish(self) -> str:
        return ""


class WholeDetokenizer:
    """For decoders whose working is unknown: any token might change any text, so all of it comes at the end."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.ends: list[int] = []
        self._decode = decode
        self._tokens: list[int] = []

    def add(self, token: int) -> str:
        self._tokens.append(token)
        return ""

    def finish(self) -> str:
        text = self._decode(self._tokens)
        if self._tokens:
            self.ends.extend([0] * (len(self._tokens) - 1) + [len(text)])
        self._tokens = []
        return text
