"""Answers as chats and text completions both show them: choices, in chunks that end with [DONE] or all at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from millpond.http.errors import ApiError
from millpond.http.events import Delta, Event, Usage
from millpond.http.openai.errors import error_body
from millpond.http.openai.logprobs import GrowingLogprobs
from millpond.http.sse import COMMENT

Json = dict[str, object]
"""JSON values, in which there may be ``msgspec.Raw``."""


@dataclass(slots=True)
class Collected:
    """One whole choice, as far as it is there."""

    logprobs: GrowingLogprobs
    texts: list[str] = field(default_factory=list)
    finish: str | None = None


class ChoicesWriter(ABC):
    """An AnswerWriter; subclasses say how a choice looks. What all chunks begin with is made once."""

    keepalive = COMMENT

    def __init__(self, chunk: Json, whole: Json, include_usage: bool) -> None:
        """``chunk`` and ``whole``: what is in both kinds of answer before their choices."""
        self._chunk = b"data: " + _opened(chunk)
        self._chunk_end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._whole = _opened(whole)
        self._include_usage = include_usage
        self._begun: set[int] = set()
        self._collected: defaultdict[int, Collected] = defaultdict(self.collected)

    @abstractmethod
    def opening(self, choice: int) -> Json | None:
        """What comes before a choice's first text in a stream, if anything does."""

    @abstractmethod
    def delta(self, delta: Delta) -> Json:
        """A choice of a chunk."""

    @abstractmethod
    def collected(self) -> Collected:
        """A whole choice that is still empty."""

    @abstractmethod
    def whole(self, index: int, choice: Collected) -> Json:
        """A choice of a whole answer."""

    def frames(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Usage):
            if self._include_usage:
                yield self._chunk + b'],"usage":' + _usage(event) + b"}\n\n"
            yield b"data: [DONE]\n\n"
            return
        if event.choice not in self._begun:
            self._begun.add(event.choice)
            if (opening := self.opening(event.choice)) is not None:
                yield self._frame(opening)
        if not event.silent:
            yield self._frame(self.delta(event))

    def failure(self, error: ApiError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n"

    def add(self, delta: Delta) -> None:
        choice = self._collected[delta.choice]
        choice.texts.append(delta.text)
        choice.logprobs.add(delta.logprobs)
        choice.finish = delta.finish

    def body(self, usage: Usage) -> Iterator[bytes]:
        """In the order of the API: choices between what is known before and after them."""
        yield self._whole
        for index in range(len(self._collected)):
            choice = self.whole(index, self._collected.pop(index))  # it is not needed twice
            yield (b"," if index else b"") + msgspec.json.encode(choice)
        yield b'],"usage":' + _usage(usage) + b"}"

    def _frame(self, choice: Json) -> bytes:
        return self._chunk + msgspec.json.encode(choice) + self._chunk_end


def _opened(head: Json) -> bytes:
    return msgspec.json.encode(head)[:-1] + b',"choices":['


def _usage(usage: Usage) -> bytes:
    return msgspec.json.encode(
        {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": usage.accepted_tokens,
                "rejected_prediction_tokens": usage.rejected_tokens,
            },
        }
    )
