"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from collections.abc import Sequence

from kvarn.text.tokenizer import Tokenizer
from kvarn.types import TokenLogprob

LOWEST = -9999.0
"""What stands for minus infinity, which JSON does not have."""


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> dict[str, object]:
    """The ``logprobs`` of a chat choice."""
    content = []
    for entry in entries:
        top = [_chat_entry(tokenizer, token, logprob) for token, logprob in entry.top]
        content.append(_chat_entry(tokenizer, entry.token, entry.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, object]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}


class CompletionLogprobs:
    """The ``logprobs`` of one plain completion, piece by piece: text offsets run on from piece to piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def render(self, entries: Sequence[TokenLogprob]) -> dict[str, object]:
        """The next entries. ``text_offset`` counts characters of the answer before each token."""
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            # Bytes that continue a character do not begin a new one.
            self._offset += sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(entry.token))
        return {
            "tokens": [self._tokenizer.token_text(entry.token) for entry in entries],
            "token_logprobs": [max(entry.logprob, LOWEST) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries] if any(entry.top for entry in entries) else None,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens and the chosen one, as the API defines it: up to one more than asked for."""
        pairs = [*entry.top, (entry.token, entry.logprob)]
        return {self._tokenizer.token_text(token): max(logprob, LOWEST) for token, logprob in pairs}
