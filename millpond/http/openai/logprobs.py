"""Log-probabilities in the two shapes of the OpenAI API: one for each event of a stream, or as the JSON of a whole
answer that grows with it, so that no answer is large work at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from millpond.text.tokenizer import Tokenizer
from millpond.types import TokenLogprob

LOWEST = -9999.0
"""What stands for minus infinity, which JSON does not have."""


class GrowingLogprobs(Protocol):
    """The ``logprobs`` of one whole choice."""

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        """The next entries."""

    def json(self) -> bytes:
        """All of them."""


class NoLogprobs:
    """For those that want none."""

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        pass

    def json(self) -> bytes:
        return b"null"


class _JsonList:
    """A JSON list that grows."""

    def __init__(self) -> None:
        self._json = bytearray(b"[")

    def extend(self, values: Iterable[object]) -> None:
        for value in values:
            if len(self._json) > 1:
                self._json += b","
            self._json += msgspec.json.encode(value)

    def json(self) -> bytes:
        return bytes(self._json) + b"]"


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, object]:
    """The ``logprobs`` of a chat choice."""
    return {"content": [_chat_token(tokenizer, entry) for entry in entries], "refusal": None}


def _chat_token(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, object]:
    top = [_chat_entry(tokenizer, token, logprob) for token, logprob in entry.top]
    return _chat_entry(tokenizer, entry.token, entry.logprob) | {"top_logprobs": top}


def _chat_entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, object]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}


class GrowingChatLogprobs:
    """The ``logprobs`` of a whole chat choice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._content = _JsonList()

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        self._content.extend(_chat_token(self._tokenizer, entry) for entry in entries)

    def json(self) -> bytes:
        return b'{"content":' + self._content.json() + b',"refusal":null}'


class CompletionLogprobs:
    """The ``logprobs`` of one plain completion, piece by piece: text offsets run on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def render(self, entries: Sequence[TokenLogprob]) -> dict[str, object]:
        """The next entries. ``text_offset`` counts characters of the answer before each token."""
        return {
            "tokens": [self.token(entry) for entry in entries],
            "token_logprobs": [max(entry.logprob, LOWEST) for entry in entries],
            "top_logprobs": [self.top(entry) for entry in entries] if any(entry.top for entry in entries) else None,
            "text_offset": [self.next_offset(entry) for entry in entries],
        }

    def token(self, entry: TokenLogprob) -> str:
        return self._tokenizer.token_text(entry.token)

    def next_offset(self, entry: TokenLogprob) -> int:
        """Where this token begins; the next one begins behind it."""
        offset = self._offset
        # Bytes that continue a character do not begin a new one.
        self._offset += sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(entry.token))
        return offset

    def top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the chosen one, as the API defines it: up to one more than asked for."""
        pairs = [*entry.top, (entry.token, entry.logprob)]
        return {self._tokenizer.token_text(token): max(logprob, LOWEST) for token, logprob in pairs}


class GrowingCompletionLogprobs:
    """The ``logprobs`` of one whole plain completion."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._render = CompletionLogprobs(tokenizer)
        self._tokens, self._chosen, self._top, self._offsets = _JsonList(), _JsonList(), _JsonList(), _JsonList()
        self._any_top = False

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        self._tokens.extend(map(self._render.token, entries))
        self._chosen.extend(max(entry.logprob, LOWEST) for entry in entries)
        self._top.extend(map(self._render.top, entries))
        self._offsets.extend(map(self._render.next_offset, entries))
        self._any_top = self._any_top or any(entry.top for entry in entries)

    def json(self) -> bytes:
        top = self._top.json() if self._any_top else b"null"
        return (
            b'{"tokens":' + self._tokens.json() + b',"token_logprobs":' + self._chosen.json()
            + b',"top_logprobs":' + top + b',"text_offset":' + self._offsets.json() + b"}"
        )  # fmt: skip
