"""Answers as chats and text completions both show them: choices, in chunks that end with [DONE] or all at once."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator

import msgspec

from millpond.dialects.pieces import CallBegun, CallEnded, CallText, Piece, Said, Thought
from millpond.http.errors import ApiError
from millpond.http.events import Begun, Delta, Event, Usage
from millpond.http.openai.errors import error_body
from millpond.http.openai.logprobs import GrowingLogprobs, Render
from millpond.http.rendering import Answering
from millpond.http.sse import COMMENT

Json = dict[str, object]
"""JSON values, in which there may be ``msgspec.Raw``."""


class Choice:
    """One choice, as far as it is there. In a stream nothing of it is kept."""

    def __init__(self, render: Render | None) -> None:
        self.render = render
        """None: log-probabilities are not wanted."""
        self._logprobs = GrowingLogprobs(render) if render is not None else None
        self._pieces: list[Piece] = []
        self.calls = 0
        """Begun so far."""
        self.broken = False
        """One has ended without its end."""
        self.finish: str | None = None

    def add(self, delta: Delta) -> None:
        self._pieces += delta.pieces
        self.broken = self.broken or any(isinstance(piece, CallEnded) and not piece.whole for piece in delta.pieces)
        if self._logprobs is not None:
            self._logprobs.add(delta.logprobs)
        self.finish = delta.finish

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self._pieces if isinstance(piece, Said))

    @property
    def thought(self) -> str:
        return "".join(piece.text for piece in self._pieces if isinstance(piece, Thought))

    @property
    def called(self) -> list[tuple[CallBegun, str]]:
        """The calls of which nothing is missing, each with its arguments."""
        found: list[tuple[CallBegun, str]] = []
        begun, arguments = CallBegun(""), list[str]()
        for piece in self._pieces:
            match piece:
                case CallBegun():
                    begun, arguments = piece, []
                case CallText(text):
                    arguments.append(text)
                case CallEnded(whole=True):
                    found.append((begun, "".join(arguments)))
        return found

    @property
    def logprobs(self) -> Json | None:
        return self._logprobs.whole() if self._logprobs is not None else None


class ChoicesWriter(ABC):
    """An AnswerWriter; subclasses say how a choice looks. What all chunks begin with is encoded once."""

    keepalive = COMMENT

    def __init__(self, chunk: Json, whole: Json, *, include_usage: bool) -> None:
        """``chunk`` and ``whole``: what stands before the choices."""
        self._chunk = b"data: " + _opened(chunk)
        self._chunk_end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._whole = _opened(whole)
        self._include_usage = include_usage
        self._choices: defaultdict[int, Choice] = defaultdict(self.choice)

    @abstractmethod
    def choice(self) -> Choice:
        """One that is still empty."""

    @abstractmethod
    def opening(self, choice: int) -> Json | None:
        """What comes before a choice's first text in a stream, if anything does."""

    @abstractmethod
    def deltas(self, delta: Delta, choice: Choice) -> Iterator[Json]:
        """The choices of so many chunks."""

    @abstractmethod
    def whole(self, index: int, choice: Choice) -> Json:
        """A choice of a whole answer."""

    def frames(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Usage):
            if self._include_usage:
                yield self._chunk + b'],"usage":' + _usage(event) + b"}\n\n"
            yield b"data: [DONE]\n\n"
            return
        if isinstance(event, Begun):
            return
        begun = event.choice in self._choices
        choice = self._choices[event.choice]
        if not begun and (opening := self.opening(event.choice)) is not None:
            yield self._frame(opening)
        if not event.silent:
            yield from map(self._frame, self.deltas(event, choice))

    def failure(self, error: ApiError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n"

    def add(self, delta: Delta) -> None:
        self._choices[delta.choice].add(delta)

    def body(self, usage: Usage) -> Iterator[bytes]:
        """In the order of the API: choices between what is known before and after them."""
        yield self._whole
        for index in range(len(self._choices)):
            choice = self.whole(index, self._choices.pop(index))  # it is not needed twice
            yield (b"," if index else b"") + msgspec.json.encode(choice)
        yield b'],"usage":' + _usage(usage) + b"}"

    def _frame(self, choice: Json) -> bytes:
        return self._chunk + msgspec.json.encode(choice) + self._chunk_end


def described(answering: Answering) -> Json:
    """What is in every answer beside its id and kind."""
    fingerprint = f"millpond-{answering.fingerprint[:12]}"
    return {"created": int(time.time()), "model": answering.model, "system_fingerprint": fingerprint}


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
                "reasoning_tokens": usage.thought_tokens,
                "accepted_prediction_tokens": usage.accepted_tokens,
                "rejected_prediction_tokens": usage.rejected_tokens,
            },
        }
    )
