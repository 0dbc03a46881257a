"""Log-probabilities in the two shapes of the OpenAI API: rendered event by event, and for a whole answer as JSON that
grows with it, so that no answer is large work at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from millpond.text.tokenizer import Tokenizer
from millpond.types import TokenLogprob

LOWEST = -9999.0
"""What stands for minus infinity, which JSON does not have."""


def _shown(logprob: float) -> float | None:
    """The first token of a prompt has none."""
    return None if math.isnan(logprob) else max(logprob, LOWEST)


Rendered = Mapping[str, Sequence[object] | None]
Render = Callable[[Sequence[TokenLogprob]], Rendered]
"""Of one choice: the next entries as its ``logprobs``."""


class GrowingLogprobs:
    """The ``logprobs`` of one whole choice: what is rendered of its parts, list by list one behind the other."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._empty = render([])
        self._json = {name: bytearray() for name in self._empty}

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        for name, values in self._render(entries).items():
            if values:
                json = self._json[name]
                json += (b"," if json else b"") + msgspec.json.encode(values)[1:-1]

    def whole(self) -> dict[str, object]:
        return {
            name: msgspec.Raw(b"[" + json + b"]") if json else self._empty[name] for name, json in self._json.items()
        }


class ChatLogprobs:
    """Of a chat's choice."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def render(self, entries: Sequence[TokenLogprob]) -> Rendered:
        return {"content": [self._token(entry) for entry in entries], "refusal": None}

    def _token(self, entry: TokenLogprob) -> dict[str, object]:
        top = [self._entry(token, logprob) for token, logprob in entry.top]
        return self._entry(entry.token, entry.logprob) | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        data = self._tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}


class CompletionLogprobs:
    """Of a text completion's choice, its prompt first where that is repeated, piece by piece: text offsets run on from
    piece to piece."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        """``top``: how many of the likeliest tokens are shown."""
        self._tokenizer = tokenizer
        self._most = top
        self._offset = 0

    def render(self, entries: Sequence[TokenLogprob]) -> Rendered:
        """``text_offset`` counts characters of the choice's text before each token."""
        return {
            "tokens": [self._tokenizer.token_text(entry.token) for entry in entries],
            "token_logprobs": [_shown(entry.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries] if self._most else None,
            "text_offset": [self._next_offset(entry) for entry in entries],
        }

    def _next_offset(self, entry: TokenLogprob) -> int:
        """Where this token begins; the next one begins behind it."""
        offset = self._offset
        # Bytes that continue a character do not begin a new one.
        self._offset += sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(entry.token))
        return offset

    def _top(self, entry: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one, as the API defines it: up to one more than asked for."""
        if math.isnan(entry.logprob):
            return None
        pairs = [*entry.top[: self._most], (entry.token, entry.logprob)]
        return {self._tokenizer.token_text(token): max(logprob, LOWEST) for token, logprob in pairs}


class PromptLogprobs:
    """The ``prompt_logprobs`` of one choice, as vLLM has them: of each token of the prompt those of the likeliest and
    its own, by their ids."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        """``top``: how many of the likeliest tokens are shown."""
        self._tokenizer = tokenizer
        self._most = top
        self._json = bytearray()

    def add(self, entries: Sequence[TokenLogprob]) -> None:
        for entry in entries:
            shown = None if math.isnan(entry.logprob) else self._places(entry)
            self._json += (b"," if self._json else b"") + msgspec.json.encode(shown)

    def whole(self) -> msgspec.Raw:
        return msgspec.Raw(b"[" + self._json + b"]")

    def _places(self, entry: TokenLogprob) -> dict[str, object]:
        best = [(token, logprob, rank) for rank, (token, logprob) in enumerate(entry.top[: self._most], 1)]
        return {
            str(token): {
                "logprob": max(logprob, LOWEST),
                "rank": rank,
                "decoded_token": self._tokenizer.token_text(token),
            }
            for token, logprob, rank in (*best, (entry.token, entry.logprob, entry.rank))
        }
